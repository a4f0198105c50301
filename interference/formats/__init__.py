"""Weight files as trainers leave them: one module a format, each a `Store`; nothing in them is ever executed."""

from interference.formats.locate import find_store
from interference.formats.names import fitted
from interference.formats.pickled import Pickled
from interference.formats.store import Renamed, Store, first_line, read_json
from interference.formats.tensors import Safetensors

__all__ = ["Pickled", "Renamed", "Safetensors", "Store", "find_store", "first_line", "fitted", "read_json"]
