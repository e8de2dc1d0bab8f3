"""Exact savings for long sequences: loss and perceptrons in parts, by a model's own hooks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from offload.tokens.causal_lm import CausalLM, causal_lm_of, perceptrons_of
from offload.tokens.loss import IGNORED, segment_tokens_for, segmented_cross_entropy
from offload.tokens.tiling import Tiled

__all__ = ["ExactTokens"]

_OF_THE_LOSS = ("num_items_in_batch", "ignore_index", "shift_labels")


class ExactTokens:
    """Has a causal language model of Hugging Face's train without ever holding its logits.

    Until it is `close()`d, a forward in training with `labels` makes the loss in segments of
    `loss_segment_tokens` (by default as many as have 64 MiB of logits in fp32), and perceptrons run
    over `mlp_tile_tokens` at a time (by default as many as the model has channels: then what a tile
    makes is as large as the weights that make it; 0: whole). Its output has no `logits` then. Other
    forwards are as they were. With `again` tiles are run again in the backward; None: where the
    model's own gradient checkpointing runs its layers again.

    Loss and gradients are the untouched model's but for the order of sums: over segments in the
    loss, over tiles in gradients of perceptrons' parameters; and where maps of fewer rows round
    otherwise. With dropout in a perceptron, masks are drawn tile by tile.

    Raises ValueError for a model whose loss or head this cannot stand for.
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
        config: Any = self.model.whole.config
        self.loss_segment_tokens = loss_segment_tokens or segment_tokens_for(config.vocab_size)
        tokens = config.hidden_size if mlp_tile_tokens is None else mlp_tile_tokens
        self.mlp_tile_tokens = int(tokens)
        self._names, self._again = self.model.names(), again
        self._under_way: list[dict[str, Any] | None] = []
        self._hidden: Tensor | None = None
        self._is_checked = False
        self._tiled: list[Tiled] = []
        if tokens:
            for each in list(perceptrons_of(self.model)):
                self._tiled.append(Tiled(each, self.mlp_tile_tokens))
        self._hooks = (
            self.model.whole.register_forward_pre_hook(self._begin, with_kwargs=True),
            self.model.decoder.register_forward_hook(self._note),
            self.model.whole.register_forward_hook(self._end, always_call=True),
        )

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
        self._tiled = []

    # ---- hooks -------------------------------------------------------------------------------

    def _begin(self, module: torch.nn.Module, inputs: Any, named: Any) -> Any:
        again = _runs_again(module) if self._again is None else self._again
        for each in self._tiled:
            each.again = again
        given = dict(zip(self._names, inputs, strict=False)) | named
        labels, shifted = given.get("labels"), given.get("shift_labels")
        if (labels is None and shifted is None) or not module.training:
            self._under_way.append(None)
            return None
        if not torch.is_grad_enabled():
            self._under_way.append(None)
            return None
        self._under_way.append({key: given.get(key) for key in ("labels", *_OF_THE_LOSS)})
        given |= {"labels": None, "logits_to_keep": 1}
        return (), given

    def _note(self, _module: torch.nn.Module, _inputs: Any, output: Any) -> None:
        if self._under_way and self._under_way[-1] is not None:
            self._hidden = output[0]

    def _end(self, module: torch.nn.Module, _inputs: Any, output: Any) -> Any:
        if not self._under_way:
            return None  # the forward failed before it began
        asked, hidden = self._under_way.pop(), self._hidden
        self._hidden = None
        if asked is None or output is None:
            return None
        if hidden is None:
            raise ValueError(
                f"{type(module).__name__} does not run its {type(self.model.decoder).__name__} as "
                "a whole, so that its last hidden states are not seen: tokens.mode can only be off "
                "with it"
            )
        if not self._is_checked:
            self._check(hidden, output)
        loss = self._loss(hidden, asked)
        if isinstance(output, tuple):
            return (loss, None, *output[1:])
        if getattr(output, "aux_loss", None) is not None:  # of experts
            loss = loss + module.router_aux_loss_coef * output.aux_loss.to(loss.device)
        output.loss = loss
        output.logits = None
        return output

    def _loss(self, hidden: Tensor, asked: dict[str, Any]) -> Tensor:
        ignored = IGNORED if asked["ignore_index"] is None else asked["ignore_index"]
        targets = asked["shift_labels"]
        if targets is None:
            # Each token's is its successor's label, and the last one has none.
            targets = torch.nn.functional.pad(asked["labels"], (0, 1), value=ignored)[..., 1:]
        count = asked["num_items_in_batch"]
        if isinstance(count, Tensor):
            count = count.to(hidden.device)
        head = self.model.head
        return segmented_cross_entropy(
            hidden,
            self._logits,
            targets.to(hidden.device),
            params=[param for param in head.parameters() if param.requires_grad],
            segment_tokens=self.loss_segment_tokens,
            count=count,
            ignored=ignored,
        )

    def _logits(self, hidden: Tensor) -> Tensor:
        return self.model.finish(self.model.head(hidden))

    @torch.no_grad()
    def _check(self, hidden: Tensor, output: Any) -> None:
        """Raise ValueError where the model's own logits of the last token are others."""
        own = output[0] if isinstance(output, tuple) else output.logits
        if not torch.equal(self._logits(hidden[:, -1:]), own):
            raise ValueError(
                f"{type(self.model.whole).__name__} makes other logits of its last hidden states "
                "than its head, so that they cannot be made in segments: tokens.mode can only be "
                "off with it"
            )
        self._is_checked = True


def _runs_again(module: torch.nn.Module) -> bool:
    """Say whether a model's layers are run again in the backward, by its own word for it."""
    for name in ("is_activation_checkpointing", "is_gradient_checkpointing"):  # newer first
        found = getattr(module, name, None)
        if found is not None:
            return bool(found)
    return False
