"""Exact savings for long sequences: loss and perceptrons in parts, by a model's own hooks."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from offload.tokens.causal_lm import CausalLM, causal_lm_of, perceptrons_of, require_whole_head
from offload.tokens.fused_loss import fused_cross_entropy
from offload.tokens.loss import IGNORED, segment_tokens_for, segmented_cross_entropy
from offload.tokens.tiling import Tiled, in_evaluation

__all__ = ["ExactTokens"]

_OF_THE_LOSS = ("labels", "shift_labels", "num_items_in_batch", "ignore_index", "return_dict")
_TRIED = 8
"""Tokens that the model's own loss is held against."""
_NEARLY, _ROUNDED = 1e-4, 2e-3
"""How far the two losses may be apart, in fp32 and in lower precision."""


class ExactTokens:
    """Has a causal language model of Hugging Face's train without ever holding its logits.

    Until it is `close()`d, a forward in training with `labels` makes the loss in segments of
    `loss_segment_tokens` (by default as many as have 16 MiB of logits in fp32), and perceptrons run
    over `mlp_tile_tokens` at a time (by default as many as the model has channels: then what a tile
    makes is as large as the weights that make it; 0: whole). Its output has no `logits` then. Other
    forwards are as they were. With `again` tiles are run again in the backward; None: where the
    model's own gradient checkpointing runs its layers again.

    Loss and gradients are the untouched model's but for the order of sums: over segments in the
    loss, over tiles in gradients of perceptrons' parameters (in these parameters' own type); and
    where maps of fewer rows round otherwise. With dropout in a perceptron, masks are drawn tile by
    tile. A forward that brings its own head (TRL's `fused_lm_head`) keeps it.

    Raises ValueError for a model whose loss or head this cannot stand for: at once, or in the first
    forward, which holds the loss of a few tokens against the model's own.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        loss_segment_tokens: int | None = None,
        mlp_tile_tokens: int | None = None,
        again: bool | None = None,
    ) -> None:
        self.model: CausalLM = causal_lm_of(model)
        config = self.model.config
        self.loss_segment_tokens = loss_segment_tokens or segment_tokens_for(config.vocab_size)
        tokens = config.hidden_size if mlp_tile_tokens is None else mlp_tile_tokens
        self.mlp_tile_tokens = int(tokens)
        self._names, self._again = self.model.names(), again
        self._under_way: list[dict[str, Any] | None] = []
        self._hidden: Tensor | None = None
        self._autocast: AbstractContextManager[object] = nullcontext()
        self._is_checked = self._is_tried = self._is_warned = False
        self._tiled: list[Tiled] = []
        self._hooks: list[Any] = []
        try:
            for each in list(perceptrons_of(self.model)) if tokens else ():
                self._tiled.append(Tiled(each, self.mlp_tile_tokens))
        except BaseException:
            self.close()
            raise
        whole, decoder = self.model.whole, self.model.decoder
        self._hooks += [
            whole.register_forward_pre_hook(self._begin, with_kwargs=True),
            decoder.register_forward_hook(self._note),
            whole.register_forward_hook(self._end, always_call=True),
        ]

    @property
    def tiled_perceptrons(self) -> int:
        """How many run in tiles; a model may have none that can."""
        return len(self._tiled)

    def close(self) -> None:
        """Leave the model as it was. Idempotent."""
        for hook in self._hooks:
            hook.remove()
        for each in self._tiled:
            each.close()
        self._tiled, self._under_way, self._hidden = [], [], None

    # ---- hooks -------------------------------------------------------------------------------

    def _begin(self, module: torch.nn.Module, inputs: Any, named: Any) -> Any:
        again = _runs_again(module) if self._again is None else self._again
        for each in self._tiled:
            each.again = again
        given = dict(zip(self._names, inputs, strict=False)) | named
        has_labels = any(given.get(key) is not None for key in ("labels", "shift_labels"))
        trains = module.training and torch.is_grad_enabled()
        if not has_labels or not trains or given.get("fused_lm_head"):
            self._under_way.append(None)
            return None
        if not self._is_checked:
            self._check(given)
        self._under_way.append({key: given.get(key) for key in _OF_THE_LOSS})
        given |= {"labels": None, "logits_to_keep": 1, "return_dict": True}
        return (), given

    def _note(self, decoder: torch.nn.Module, _inputs: Any, output: Any) -> None:
        if self._is_tried or (self._under_way and self._under_way[-1] is not None):
            self._hidden = output[0]
            # As the model's head is to run: a framework may have it run by autocast in here alone.
            self._autocast = _present_autocast(self._hidden.device.type)
        elif not self._under_way and torch.is_grad_enabled() and decoder.training:
            self._warn_of_another_way()

    def _warn_of_another_way(self) -> None:
        if not self._is_warned:
            self._is_warned = True
            name = type(self.model.whole).__name__
            warnings.warn(
                f"the decoder of {name} ran outside of a call of {name}, by its forward() say: its "
                "loss is not made in segments then",
                stacklevel=3,
            )

    def _end(self, module: torch.nn.Module, _inputs: Any, output: Any) -> Any:
        if not self._under_way:
            return None  # the forward failed before it began
        asked = self._under_way.pop()
        if asked is None:
            return None
        hidden, self._hidden = self._hidden, None
        if output is None:
            return None
        loss = self._loss(self._seen(hidden), asked)
        aux_loss = getattr(output, "aux_loss", None)  # of experts
        if aux_loss is not None:
            loss = loss + self.model.aux_coefficient() * aux_loss.to(loss.device)
        # Made anew, so that the loss comes first.
        found = type(output)(**{**output, "loss": loss, "logits": None})
        wants_tuple = asked["return_dict"] is False
        return found.to_tuple() if wants_tuple else found

    def _seen(self, hidden: Tensor | None) -> Tensor:
        """Return the decoder's last hidden states. Raises ValueError where they were not seen."""
        if hidden is None:
            whole, decoder = (
                type(each).__name__ for each in (self.model.whole, self.model.decoder)
            )
            raise ValueError(
                f"{whole} does not run its {decoder} as a whole, so that its last hidden states "
                "are not seen: tokens.mode can only be off with it"
            )
        return hidden

    def _loss(self, hidden: Tensor, asked: dict[str, Any]) -> Tensor:
        ignored = IGNORED if asked.get("ignore_index") is None else asked["ignore_index"]
        targets = asked.get("shift_labels")
        if targets is None:
            # Each token's is its successor's label, and the last one has none.
            targets = torch.nn.functional.pad(asked["labels"], (0, 1), value=ignored)[..., 1:]
        count = asked.get("num_items_in_batch")
        if isinstance(count, Tensor):
            count = count.to(hidden.device)
        targets = targets.to(hidden.device)
        model = self.model
        with self._autocast:
            fused = fused_cross_entropy(
                hidden, model.head, model.finish, targets, count=count, ignored=ignored
            )
            if fused is not None:
                return fused
            return segmented_cross_entropy(
                hidden,
                self._logits,
                targets,
                params=[*model.head.parameters()] if torch.is_grad_enabled() else (),
                segment_tokens=self.loss_segment_tokens,
                count=count,
                ignored=ignored,
            )

    def _logits(self, hidden: Tensor) -> Tensor:
        return self.model.finish(self.model.head(hidden))

    @torch.no_grad()
    def _check(self, given: dict[str, Any]) -> None:
        """Raise ValueError where the model's own loss of a few tokens is another one."""
        require_whole_head(self.model)
        whole = self.model.whole
        key = "input_ids" if given.get("input_ids") is not None else "inputs_embeds"
        few = given[key][:1, :_TRIED]
        if few.shape[1] < 2:
            return  # of which no token has a successor
        labels = few if key == "input_ids" else torch.zeros_like(few[..., 0], dtype=torch.long)
        self._is_tried = True
        try:
            with in_evaluation(whole):
                own = whole(**{key: few}, labels=labels, return_dict=True)
        finally:
            hidden, self._hidden = self._hidden, None
            self._is_tried = False
        hidden = self._seen(hidden)
        with self._autocast:
            logits = self._logits(hidden)
        ours = self._loss(hidden, {"labels": labels})
        aux_loss = getattr(own, "aux_loss", None)
        if aux_loss is not None:
            ours = ours + self.model.aux_coefficient() * aux_loss.to(ours.device)
        nearly = _NEARLY if logits.dtype == torch.float32 else _ROUNDED
        apart = abs(float(ours) - float(own.loss))
        same = torch.equal(logits.to(own.logits.dtype), own.logits)
        if not same or not apart <= nearly * abs(float(own.loss)):
            what = "the same" if same else "other"
            raise ValueError(
                f"{type(whole).__name__} has a loss of {float(own.loss)} by {what} logits, and its "
                f"head's have one of {float(ours)}, so that it cannot be made in segments: "
                "tokens.mode can only be off with it"
            )
        self._is_checked = True


def _present_autocast(device_type: str) -> AbstractContextManager[object]:
    """Return a context that is as the present one is."""
    enabled = torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, torch.get_autocast_dtype(device_type), enabled=enabled)


def _runs_again(module: torch.nn.Module) -> bool:
    """Say whether a model's layers are run again in the backward, by its own word for it."""
    for name in ("is_activation_checkpointing", "is_gradient_checkpointing"):  # newer first
        found = getattr(module, name, None)
        if found is not None:
            return bool(found)
    return False
