"""LightningCLI's parser with errors of one line: file, key, value and remedy."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar, NoReturn

from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser

from memtx.cli.config import CONFIG_OPTIONS, check_config, format_parser_error, get_option_values, read_config
from memtx.cli.errors import EXIT_USAGE_ERROR, print_error
from memtx.cli.explain import Explainer, innermost_reason, suggest_remedy
from memtx.data.books import BookDataModule
from memtx.errors import MemtxError
from memtx.layers.feed_forward import SwiGLU
from memtx.memory.compressed import CompressedMemory
from memtx.models.memory_transformer import MemoryTransformer
from memtx.training.language import LanguageModule


class OneLineParser(LightningArgumentParser):
    """Parser that reports an error as one line with the closest valid key and exits with code 2."""

    # Shared by the class: nested parts get parsers of their own, whose errors name the file as well.
    configs: ClassVar[dict[str, dict[str, Any]]] = {}
    arguments: ClassVar[list[str]] = []
    options: ClassVar[list[Any]] = []

    def __init__(self, *positional: Any, **keywords: Any) -> None:
        # No abbreviations: the code that finds the run of an evaluation reads full names.
        super().__init__(*positional, allow_abbrev=False, **keywords)

    def parse_args(self, args: Any = None, *positional: Any, **keywords: Any) -> Any:
        """Check the config files, then parse."""
        if isinstance(args, list) and args and (parsers := self._subcommand_parsers()):
            self.configs.clear()
            if args[0] in parsers:
                self.arguments[:], self.options[:] = args[1:], parsers[args[0]]._actions
            for path in get_option_values(args, *CONFIG_OPTIONS) if args[0] in parsers else ():
                self.configs[path] = read_config(path)
                keys = {name: [action.dest for action in parser._actions] for name, parser in parsers.items()}
                check_config(path, self.configs[path], keys.pop(args[0]), keys)
        return super().parse_args(args, *positional, **keywords)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Write one line on stderr and exit with code 2."""
        error = find_memtx_error(ex) or Explainer(self.options, self.arguments, self.configs, message).explain()
        print_error(str(error or format_parser_error(message, self.configs, self._known_keys())))
        raise SystemExit(EXIT_USAGE_ERROR)

    def _subcommand_parsers(self) -> dict[str, Any]:
        return getattr(getattr(self, "_subcommands_action", None), "_name_parser_map", {})

    def _known_keys(self) -> list[str]:
        targets: list[Any] = [MemoryTransformer, CompressedMemory, SwiGLU, LanguageModule, BookDataModule, Trainer]
        parameters = [name for target in targets for name in inspect.signature(target).parameters]
        parsers = [self, *self._subcommand_parsers().values()]
        return [action.dest for parser in parsers for action in parser._actions] + parameters


def find_memtx_error(error: BaseException | None) -> MemtxError | None:
    """Return the MemtxError that caused an error, if any."""
    while error is not None and not isinstance(error, MemtxError):
        error = error.__cause__ or error.__context__
    return error


def to_memtx_error(error: Exception) -> MemtxError:
    """Return the MemtxError that caused an error, or one with its first line."""
    if (cause := find_memtx_error(error)) is not None:
        return cause
    reason = innermost_reason(str(error)) or type(error).__name__
    return suggest_remedy(reason, inspect.signature(Trainer).parameters)
