from __future__ import annotations

from tests.commands.conftest import program  # noqa: F401
from tests.inference.conftest import byte_model, byte_tokenizer, pair_model, pair_tokenizer, text  # noqa: F401
