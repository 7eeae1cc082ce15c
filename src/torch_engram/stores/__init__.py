"""Row ids to encoded records: stores, codecs and tables on disk. Knows integers and bytes, no token."""

from torch_engram.stores.cached import CachedStore, WritableCachedStore, cached
from torch_engram.stores.codecs import CODECS, Codec, Component
from torch_engram.stores.decoded import DecodedRows
from torch_engram.stores.device import DeviceStore
from torch_engram.stores.disk import DiskStore
from torch_engram.stores.disk_table import DiskTable
from torch_engram.stores.file_rows import FileRows
from torch_engram.stores.host import HostStore
from torch_engram.stores.loaded import LoadedStore
from torch_engram.stores.manifest import Manifest, Part, planes_of
from torch_engram.stores.ngram_cache import Begun, Heads, NgramCache, ngram_cache
from torch_engram.stores.parts import check_table, load_table, parts_in, save_table, save_touched, update_table
from torch_engram.stores.protocol import Store, WritableStore
from torch_engram.stores.records import Plane, RecordLayout, RowFormat, make_keys
from torch_engram.stores.shard import Shard, ShardedStore
from torch_engram.stores.shared_host import SharedHostStore

__all__ = [
    "CODECS",
    "Begun",
    "CachedStore",
    "Codec",
    "Component",
    "DecodedRows",
    "DeviceStore",
    "DiskStore",
    "DiskTable",
    "FileRows",
    "Heads",
    "HostStore",
    "LoadedStore",
    "Manifest",
    "NgramCache",
    "Part",
    "Plane",
    "RecordLayout",
    "RowFormat",
    "Shard",
    "ShardedStore",
    "SharedHostStore",
    "Store",
    "WritableCachedStore",
    "WritableStore",
    "cached",
    "check_table",
    "load_table",
    "make_keys",
    "ngram_cache",
    "parts_in",
    "planes_of",
    "save_table",
    "save_touched",
    "update_table",
]
