"""Public names of memtx, the one list of them: ``lazy_loader`` reads it, and type checkers do."""

__version__: str

from . import hf as hf
from .checkpoint.load import from_pretrained as from_pretrained
from .data.books import BookDataModule as BookDataModule
from .data.series.data_module import SeriesDataModule as SeriesDataModule
from .errors import MemtxError as MemtxError
from .inference.generate import generate as generate
from .inference.predictor import load_predictor as load_predictor
from .inference.reader import StreamReader as StreamReader
from .inference.series import SeriesPredictor as SeriesPredictor
from .layers.feed_forward import FeedForward as FeedForward
from .layers.feed_forward import SwiGLU as SwiGLU
from .layers.positions.base import Alibi as Alibi
from .layers.positions.rotary import Rotary as Rotary
from .layers.vector_heads import GaussianMixtureHead as GaussianMixtureHead
from .layers.vector_heads import RegressionHead as RegressionHead
from .memory.associative import AssociativeMemory as AssociativeMemory
from .memory.compressed import CompressedMemory as CompressedMemory
from .memory.copy_memory import CopyMemory as CopyMemory
from .memory.ernie_doc import ErnieDocMemory as ErnieDocMemory
from .memory.gated_delta_net import GatedDeltaNet as GatedDeltaNet
from .memory.memory_tokens import TokenMemory as TokenMemory
from .memory.none import NoMemory as NoMemory
from .memory.recurrent import RecurrentMemory as RecurrentMemory
from .memory.retrieval import RetrievalMemory as RetrievalMemory
from .memory.rmt import ARMTMemory as ARMTMemory
from .memory.rmt import RMTMemory as RMTMemory
from .memory.sinks import SinkMemory as SinkMemory
from .memory.slots import SlotMemory as SlotMemory
from .memory.top_k import TopKMemory as TopKMemory
from .models.encoder import Encoder as Encoder
from .models.encoder_decoder import EncoderDecoder as EncoderDecoder
from .models.growing_windows import GrowingWindows as GrowingWindows
from .models.memory_transformer import MemoryTransformer as MemoryTransformer
from .models.recurrent_lm import MemoryOutput as MemoryOutput
from .models.reformer import Reformer as Reformer
from .models.sequence_model import SequenceModel as SequenceModel
from .models.sources import list_sources as list_sources
from .models.sources import without_source as without_source
from .models.transformer_xl import TransformerXL as TransformerXL
from .state import MemoryState as MemoryState
from .training.language import LanguageModule as LanguageModule
from .training.sequence import SequenceModule as SequenceModule
