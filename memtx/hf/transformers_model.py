"""Language models of memtx as models of ``transformers``: configuration, cache and causal language model.

Importing this module needs ``transformers`` (``pip install 'memtx[hf]'``). The state of a stream is the model's
``cache``, earlier called ``past_key_values``: its size is constant however much was read.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any, ClassVar, Self

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from memtx import class_config
from memtx.errors import CheckpointError, MemtxError, check_at_least
from memtx.hf import exported
from memtx.hf.memory_cache import MemoryCache, check_cache
from memtx.hf.padding import PaddedBatch, read_masks
from memtx.models.memory_transformer import MemoryTransformer
from memtx.models.vocabulary import resize_vocabulary
from memtx.ops.cross_entropy import IGNORE_INDEX

CACHE_NAME = next(field.name for field in fields(CausalLMOutputWithPast) if field.name in ("cache", "past_key_values"))
"""Name of the cache: ``past_key_values`` in earlier releases of ``transformers``."""


class MemtxConfig(transformers.PretrainedConfig):  # type: ignore[misc]
    """Configuration of a :class:`MemtxForCausalLM`.

    Args:
        memtx: ``class_path`` and ``init_args`` of the model.
        segment_length: Tokens read at a time; longer inputs are streamed.
        **options: Entries of every configuration of ``transformers``.
    """

    model_type = exported.MODEL_TYPE
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["cache", "past_key_values"]

    def __init__(
        self, memtx: dict[str, Any] | None = None, segment_length: int = exported.SEGMENT_LENGTH, **options: Any
    ) -> None:
        check_at_least(1, segment_length=segment_length)
        self.memtx, self.segment_length = memtx, segment_length
        self.auto_map = options.pop("auto_map", None) or dict(exported.AUTO_MAP)
        super().__init__(**options)


class MemtxForCausalLM(transformers.PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """A causal language model of memtx, whose ``cache`` is a :class:`MemoryCache`.

    Attributes:
        model: The model of memtx, for :class:`memtx.StreamReader`, ``save_pretrained`` and all else.
    """

    config_class = MemtxConfig
    base_model_prefix = exported.PREFIX.rstrip(".")
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True  # memtx chooses the kernel itself
    _is_stateful = True  # refuses generation that takes tokens back
    _skip_keys_device_placement = ("cache", "past_key_values")

    def __init__(self, config: MemtxConfig, model: MemoryTransformer | None = None) -> None:
        super().__init__(config)
        self.gradient_checkpointing = False
        if model is None:
            if config.memtx is None:
                raise MemtxError("The MemtxConfig has no memtx entry.", "Build it with MemtxForCausalLM.wrap.")
            # transformers builds on the meta device and would lose the values of buffers that it does not store.
            with torch.device("cpu"):
                model = class_config.from_config(config.memtx)()
        self._set_model(exported.check_language_model(model))
        self.post_init()

    def _set_model(self, model: MemoryTransformer) -> None:
        """Take a model, and note which of its weights are tied and which buffers are not stored."""
        self.model, prefix = model, exported.PREFIX
        self._tied_weights_keys = {
            prefix + alias: prefix + name for alias, name in exported.tied_aliases(model).items()
        }
        self.config.tie_word_embeddings = bool(self._tied_weights_keys)
        stored = self.state_dict().keys()
        self._constants = {name: buffer.clone() for name, buffer in self.named_buffers() if name not in stored}

    @classmethod
    def wrap(cls, model: MemoryTransformer, *, segment_length: int = exported.SEGMENT_LENGTH, **options: Any) -> Self:
        """Return a loaded model, with its own weights, for ``generate``, ``Trainer`` and peft.

        Args:
            model: Language model.
            segment_length: Tokens read at a time; longer inputs are streamed.
            **options: Further entries of the configuration, such as ``eos_token_id``.
        """
        if exported.check_language_model(model).adapter_config is not None:
            raise MemtxError("The model has LoRA adapters.", "Save it, which merges them, and load it again.")
        description = exported.describe(model, segment_length=segment_length)
        wrapped: Self = cls(cls.config_class(**{**description, **options}), model).train(model.training)
        return wrapped

    @classmethod
    def from_pretrained(cls, path: Any, *arguments: Any, **options: Any) -> Any:
        """Load a folder or repository as in ``transformers``; raises CheckpointError if it lacks weights."""
        returns_info = options.pop("output_loading_info", False)
        model, info = super().from_pretrained(path, *arguments, output_loading_info=True, **options)
        if missing := sorted(info["missing_keys"]):
            message = f"'{path}' lacks {', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}."
            raise CheckpointError(message, "Use the config.json that belongs to these weights.")
        model._restore_constants()
        return (model, info) if returns_info else model

    def save_pretrained(self, save_directory: Any, **options: Any) -> None:
        """Write the folder as in ``transformers``, with the module file that opens it."""
        self.config.auto_map = dict(exported.AUTO_MAP)
        if options.get("is_main_process", True):
            exported.write_module(save_directory)  # first, since super() may upload the folder
        super().save_pretrained(save_directory, **options)

    def _init_weights(self, module: nn.Module) -> None:
        """Do nothing: the constructor has initialized the weights."""

    def _restore_constants(self) -> None:
        """Fill the buffers that are not stored, which ``from_pretrained`` replaces by uninitialized ones."""
        for name, value in self._constants.items():
            buffer = self.get_buffer(name)
            buffer.copy_(value.to(buffer))

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding."""
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding by a module such as an adapter's, of the same vocabulary."""
        self.model.embedding = value

    def get_output_embeddings(self) -> nn.Module:
        """Return the head."""
        return self.model.head

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Module:
        """Change the vocabulary and return the new embedding; weights of new tokens are the mean of the others.

        Args:
            new_num_tokens: Number of tokens. None keeps it.
            pad_to_multiple_of: The number is raised to a multiple of it.
            mean_resizing: Must be True.

        Raises:
            MemtxError: ``mean_resizing`` is False, or a number is not positive.
        """
        vocab_size: int = self.config.vocab_size if new_num_tokens is None else new_num_tokens
        multiple = 1 if pad_to_multiple_of is None else pad_to_multiple_of
        check_at_least(1, new_num_tokens=vocab_size, pad_to_multiple_of=multiple)
        if not mean_resizing:
            raise MemtxError("mean_resizing is False, which is not supported.", "Remove it.")
        vocab_size = -(-vocab_size // multiple) * multiple
        if vocab_size != self.config.vocab_size:
            self._set_model(resize_vocabulary(self.model, vocab_size))
            self.config.memtx, self.config.vocab_size = self.model.config, vocab_size
        return self.get_input_embeddings()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: MemoryCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        past_key_values: MemoryCache | None = None,
        **options: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Read ids of any length, segment by segment.

        Args:
            input_ids: ``(batch, length)`` int64, the ids that follow those of the cache.
            attention_mask: ``(batch, length)``, or with the columns of the cache's ids before; 0 marks padding. Padding
                on the left is as if it were not there; on the right it is not carried over.
            position_ids: ``(batch, length)``, counting up by 1; 0 begins a document, which sees nothing before it.
            cache: State of the streams, which is updated; None for fresh streams. ``past_key_values`` is its old name.
            inputs_embeds: ``(batch, length, dim)`` in place of ``get_input_embeddings()(input_ids)``.
            labels: ``(batch, length)``, ``input_ids`` with -100 where no token is to be predicted.
            use_cache: If True, return the cache. Defaults to True, but for training and for padding on the right in
                models that cannot leave it out of the state.
            output_hidden_states: If True, return the outputs of the embedding and the layers, the last one normalized.
            output_attentions: Not supported.
            return_dict: If False, return a tuple.
            logits_to_keep: Number of last positions, or the positions, to return logits for. 0 for all.
            past_key_values: The same as ``cache``.
            **options: Arguments of the loss, such as ``num_items_in_batch``.

        Raises:
            MemtxError: Arguments are not supported or do not fit each other.
        """
        inputs = input_ids if inputs_embeds is None else inputs_embeds
        if inputs is None or (input_ids is not None and inputs_embeds is not None):
            raise MemtxError("Neither or both of input_ids and inputs_embeds are given.", "Give one of them.")
        if output_attentions:
            raise MemtxError("output_attentions is not supported.", "Remove it; see memtx.list_sources.")
        if labels is not None and labels.shape != inputs.shape[:2]:
            raise MemtxError(f"labels is {tuple(labels.shape)}, expected {tuple(inputs.shape[:2])}.", "Match them.")
        if cache is not None and past_key_values is not None and cache is not past_key_values:
            raise MemtxError("Both cache and past_key_values are given.", f"Give {CACHE_NAME} alone.")
        cache = check_cache(cache if cache is not None else past_key_values)
        cache = MemoryCache() if cache is None else cache
        batch = read_masks(
            self.model, inputs, attention_mask, position_ids, state=cache.state, num_cached=cache.num_tokens,
            is_continued=cache.is_continued,
        )  # fmt: skip
        returns_cache = self._returns_cache(use_cache, batch)
        self.model.activation_checkpointing = self.gradient_checkpointing and self.training
        wants_hidden_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return_dict = self.config.return_dict if return_dict is None else return_dict
        is_step = inputs.shape[1:] == (1,) and batch.document_starts is batch.valid_length is None
        if is_step and returns_cache and labels is None and not (wants_hidden_states or torch.is_grad_enabled()):
            logits_of_step = cache.step(self.model, batch.inputs[:, 0])[:, None]
            output = CausalLMOutputWithPast(logits=logits_of_step, **{CACHE_NAME: cache})
            return output if return_dict else output.to_tuple()
        state = self.model.init_state(len(inputs)) if cache.state is None else cache.state
        logits: list[Tensor] = []
        hidden_states: list[tuple[Tensor, ...]] = []
        aux_loss = torch.zeros((), device=inputs.device)
        length = inputs.shape[1]
        num_skipped = length - logits_to_keep if isinstance(logits_to_keep, int) and logits_to_keep else 0
        for start in range(0, length, self.config.segment_length):
            end = min(start + self.config.segment_length, length)
            segment = batch.slice(start, end, carries_state=returns_cache)
            out = self.model(**segment, state=state, return_hidden_states=wants_hidden_states)
            state = out.state
            if end > num_skipped:
                logits.append(out.logits[:, max(num_skipped - start, 0) :])
            if wants_hidden_states:
                hidden_states.append((*out.hidden_states[:-1], self.model.norm(out.hidden_states[-1])))
            aux_loss = aux_loss + sum(out.aux_losses.values()) * ((end - start) / length)
        if returns_cache:
            cache.state, cache.num_tokens = state, cache.num_tokens + length
        all_logits = torch.cat(logits, dim=1)
        if isinstance(logits_to_keep, Tensor):
            all_logits = all_logits[:, logits_to_keep]
        output = CausalLMOutputWithPast(
            loss=None if labels is None else self._loss(all_logits, labels, aux_loss, options),
            logits=all_logits,
            hidden_states=tuple(torch.cat(parts, dim=1) for parts in zip(*hidden_states, strict=True)) or None,
            **{CACHE_NAME: cache if returns_cache else None},
        )
        return output if return_dict else output.to_tuple()

    def _returns_cache(self, use_cache: bool | None, batch: PaddedBatch) -> bool:
        """Return whether to return the cache; raises MemtxError if one was requested that cannot be computed."""
        supported = batch.valid_length is None or (self.model.supports_padding and not self.training)
        if use_cache and not supported:
            reason = "in training" if self.training else "with this model's memories"
            message = f"A cache cannot leave out padding on the right {reason}."
            raise MemtxError(message, "Pad on the left (tokenizer.padding_side), or set use_cache=False.")
        default = getattr(self.config, "use_cache", True) and not self.training
        return supported and (default if use_cache is None else use_cache)

    def _loss(self, logits: Tensor, labels: Tensor, aux_loss: Tensor, options: dict[str, Any]) -> Tensor:
        """Return the language loss, as ``transformers`` averages it, plus the losses of the memories."""
        if logits.shape[1] != labels.shape[1]:
            raise MemtxError("logits_to_keep was given with labels.", "Remove one of them.")
        loss: Tensor = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **options)
        if (num_items := options.get("num_items_in_batch")) is not None:
            # This call's share of the gradient of an optimizer step.
            aux_loss = aux_loss * ((labels[:, 1:] != IGNORE_INDEX).sum() / num_items)
        return loss + aux_loss

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *arguments: Any, **options: Any
    ) -> None:
        """Give ``generate`` a fresh cache unless the caller has one; raises MemtxError for a cache of another kind."""
        if (kind := generation_config.cache_implementation) not in (None, "dynamic"):
            raise MemtxError(f"cache_implementation is '{kind}'.", "Remove it: the cache of this model is its state.")
        cache = check_cache(model_kwargs.get(CACHE_NAME))
        if cache is None and generation_config.use_cache is not False:
            model_kwargs[CACHE_NAME] = MemoryCache()

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Return the arguments of the next call of ``generate``."""
        # generate looks for the name kwargs, which lets it pass the arguments of forward.
        # Positions would begin at 0 after a cache whose text is not among the ids; the model counts itself.
        kwargs.pop("position_ids", None)
        if next_sequence_length is not None and next_sequence_length < 1:
            cached = input_ids.shape[1] - next_sequence_length
            message = f"input_ids has {input_ids.shape[1]} ids, but the cache has read {cached}."
            raise MemtxError(message, "Give the ids of the text so far and what follows, or cache.continued().")
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(
            input_ids, next_sequence_length, inputs_embeds=inputs_embeds, **kwargs
        )
        return inputs


AutoConfig.register(exported.MODEL_TYPE, MemtxConfig, exist_ok=True)
AutoModelForCausalLM.register(MemtxConfig, MemtxForCausalLM, exist_ok=True)
