"""memtx: transformers that read texts of any length, one segment at a time, with a state of fixed size.

Public names are imported on first use, so that ``import memtx`` takes milliseconds.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
