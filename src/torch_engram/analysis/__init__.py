"""What can be seen in a trained memory: gates, traces, use of the rows, loss by frequency, and the report of runs. And
before there is one: how often a text asks for the same n-grams, and where tables fit."""

from torch_engram.analysis.frequency import FrequencySplit, NgramCounts, count_ngrams, loss_by_frequency
from torch_engram.analysis.gates import GateMap, gate_map, read_gates
from torch_engram.analysis.hit_rates import Ngrams, Steps, Traffic, number_ngrams, traffic
from torch_engram.analysis.machine import Machine
from torch_engram.analysis.placement import Placement, Tables, placements
from torch_engram.analysis.report import DemoReport, RunReport, render
from torch_engram.analysis.token_text import token_texts
from torch_engram.analysis.tracing import Trace, over_canonical, trace_canonical, trace_ids
from torch_engram.analysis.usage import Sharing, TableUsage, ngram_sharing, table_usage

__all__ = [
    "DemoReport",
    "FrequencySplit",
    "GateMap",
    "Machine",
    "NgramCounts",
    "Ngrams",
    "Placement",
    "RunReport",
    "Sharing",
    "Steps",
    "TableUsage",
    "Tables",
    "Trace",
    "Traffic",
    "count_ngrams",
    "gate_map",
    "loss_by_frequency",
    "ngram_sharing",
    "number_ngrams",
    "over_canonical",
    "placements",
    "read_gates",
    "render",
    "table_usage",
    "token_texts",
    "trace_canonical",
    "trace_ids",
    "traffic",
]
