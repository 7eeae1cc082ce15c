"""What can be seen in a trained memory: gates, traces, use of the rows, loss by frequency, what layers predict and are
like, and the report of runs. And before there is one: how often a text asks for the same n-grams, and where tables fit.
"""

from torch_engram.analysis.ablation import Ablation, ablate
from torch_engram.analysis.cka import cka_matrix, soft_alignment
from torch_engram.analysis.collisions import Collisions, DistinctNgrams, distinct_ngrams, table_collisions
from torch_engram.analysis.frequency import FrequencySplit, NgramCounts, count_ngrams, loss_by_frequency
from torch_engram.analysis.gates import GateMap, gate_map, read_gates
from torch_engram.analysis.hit_rates import Ngrams, Steps, Traffic, number_ngrams, traffic
from torch_engram.analysis.lens import Lens, logit_lens
from torch_engram.analysis.locating import Carrier, Located, locate
from torch_engram.analysis.machine import Machine
from torch_engram.analysis.placement import Placement, Tables, placements
from torch_engram.analysis.reading import Reading, read_text
from torch_engram.analysis.report import DemoReport, RunReport, render
from torch_engram.analysis.subject import DecoderSubject, HubSubject, Subject, open_subject
from torch_engram.analysis.token_text import token_texts
from torch_engram.analysis.tracing import Trace, over_canonical, trace_canonical, trace_ids
from torch_engram.analysis.usage import Sharing, TableUsage, ngram_sharing, table_usage
from torch_engram.analysis.zipf import HeapsLaw, PowerLaw, fit_heaps, fit_power_law

__all__ = [
    "Ablation",
    "Carrier",
    "Collisions",
    "DecoderSubject",
    "DemoReport",
    "DistinctNgrams",
    "FrequencySplit",
    "GateMap",
    "HeapsLaw",
    "HubSubject",
    "Lens",
    "Located",
    "Machine",
    "NgramCounts",
    "Ngrams",
    "Placement",
    "PowerLaw",
    "Reading",
    "RunReport",
    "Sharing",
    "Steps",
    "Subject",
    "TableUsage",
    "Tables",
    "Trace",
    "Traffic",
    "ablate",
    "cka_matrix",
    "count_ngrams",
    "distinct_ngrams",
    "fit_heaps",
    "fit_power_law",
    "gate_map",
    "locate",
    "logit_lens",
    "loss_by_frequency",
    "ngram_sharing",
    "number_ngrams",
    "open_subject",
    "over_canonical",
    "placements",
    "read_gates",
    "read_text",
    "render",
    "soft_alignment",
    "table_collisions",
    "table_usage",
    "token_texts",
    "trace_canonical",
    "trace_ids",
    "traffic",
]
