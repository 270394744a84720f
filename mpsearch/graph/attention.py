"""Attention whose projections are layers: each is called, and thus seen, priced and quantized like any other.

torch's and torchvision's attention multiplies by the weights of projections that it never calls, some packed into one
matrix. `opened` puts modules in their place that compute the same and call a layer for each projection:

- `nn.MultiheadAttention`: `q_proj`, `k_proj`, `v_proj`, `out_proj`; its state dict keeps the packed names and tensors;
- torchvision's shifted windows (Swin, Swin V2): `qkv`, `proj`, which were there.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PROJECTIONS = ("q_proj", "k_proj", "v_proj")


def opened(model: nn.Module) -> nn.Module:
    """`model` with every attention opened; a copy that shares its parameters, or itself where nothing is to open.

    Attention with a forward of its own (a subclass) stays as it is.
    """
    if not any(_form(module) for module in model.modules()):
        return model
    # Handed to deepcopy as copied already: other modules around the same parameters.
    model = copy.deepcopy(model, {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]})
    twins = {module: form(module) for module in model.modules() if (form := _form(module)) is not None}
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child in twins:
                parent._modules[name] = twins[child]
        if isinstance(parent, nn.TransformerEncoder):
            parent.use_nested_tensor = False  # nested tensors are for a fused kernel, which reads packed weights
    return twins.get(model, model)


def _form(module: nn.Module) -> Callable[[Any], nn.Module] | None:
    """What opens a module, if anything does."""
    if type(module).forward is nn.MultiheadAttention.forward:
        return OpenAttention
    swin = sys.modules.get("torchvision.models.swin_transformer")  # a model that has such windows has imported it
    if swin is not None and type(module) in (swin.ShiftedWindowAttention, swin.ShiftedWindowAttentionV2):
        return OpenWindowAttention
    return None


class OpenAttention(nn.Module):
    """`nn.MultiheadAttention` with a layer for each projection; same arguments, outputs and state dict."""

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    in_proj_bias = None  # by this nn.TransformerEncoderLayer knows that its fused kernel is not for this module

    def __init__(self, packed: nn.MultiheadAttention) -> None:
        """Take over the parameters of `packed`."""
        super().__init__()
        self.num_heads, self.dropout, self.batch_first = packed.num_heads, packed.dropout, packed.batch_first
        self.add_zero_attn = packed.add_zero_attn
        self.packed = packed.in_proj_weight is not None  # else the original has three weights, but still one bias
        weights = (
            _thirds(packed.in_proj_weight)
            if self.packed
            else (packed.q_proj_weight, packed.k_proj_weight, packed.v_proj_weight)
        )
        biases = _thirds(packed.in_proj_bias)
        for name, weight, bias in zip(PROJECTIONS, weights, biases, strict=True):
            setattr(self, name, _linear(weight, bias))
        self.out_proj = _linear(packed.out_proj.weight, packed.out_proj.bias)
        self.bias_k, self.bias_v = packed.bias_k, packed.bias_v
        self.register_state_dict_post_hook(_packed_names)  # type: ignore[no-untyped-call]
        self.train(packed.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """softmax(q k^T / sqrt(d) + mask) v for each head, projected; see `nn.MultiheadAttention`.

        Args:
            query: `(n, l, e)`; `(l, n, e)` unless `batch_first`; `(l, e)` unbatched. `key`, `value` likewise, of s.
            key_padding_mask: `(n, s)`, `attn_mask`: `(l, s)` or `(n * heads, l, s)`; true: ignored, or what is added.
            is_causal: a hint that `attn_mask` is causal; the mask is used as it is.
        """
        batched = query.dim() == 3
        q, k, v = (
            x if batched and self.batch_first else x.transpose(0, 1) if batched else x.unsqueeze(0)
            for x in (self.q_proj(query), self.k_proj(key), self.v_proj(value))
        )
        n, added = len(q), (self.bias_k is not None) + self.add_zero_attn  # key positions beyond the given ones
        if self.bias_k is not None and self.bias_v is not None:
            k, v = torch.cat([k, self.bias_k.expand(n, 1, -1)], 1), torch.cat([v, self.bias_v.expand(n, 1, -1)], 1)
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        q, k, v = (_heads(x, self.num_heads) for x in (q, k, v))  # (n, heads, l or s, d)
        mask = self._mask(attn_mask, key_padding_mask, q.dtype, added)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q / math.sqrt(q.shape[-1]) @ k.transpose(-2, -1)
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            y = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        y = y.transpose(1, 2).flatten(2)
        y = y if batched and self.batch_first else y.transpose(0, 1) if batched else y.squeeze(0)
        return self.out_proj(y), weights if batched or weights is None else weights.squeeze(0)

    def _mask(self, attend: Tensor | None, padding: Tensor | None, dtype: torch.dtype, added: int) -> Tensor | None:
        """What is added to the scores `(n, heads, l, s + added)`, or broadcasts to it."""

        def additive(mask: Tensor) -> Tensor:
            if mask.dtype == torch.bool:
                mask = torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -math.inf)
            return F.pad(mask, (0, added))

        masks = []
        if attend is not None:
            attend = additive(attend)
            masks.append(attend if attend.dim() == 2 else attend.view(-1, self.num_heads, *attend.shape[1:]))
        if padding is not None:
            masks.append(additive(padding)[..., None, None, :])
        return sum(masks[1:], masks[0]) if masks else None

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Give the projections their parts of what is packed, before they look for them."""
        for packed, parts, _ in _NAMES:
            if (whole := state_dict.pop(prefix + packed, None)) is not None:
                values = whole.chunk(len(parts))
                state_dict.update({prefix + part: value for part, value in zip(parts, values, strict=True)})
        super()._load_from_state_dict(state_dict, prefix, *args)


_NAMES = (
    ("in_proj_weight", tuple(f"{name}.weight" for name in PROJECTIONS), True),
    *((f"{name}_weight", (f"{name}.weight",), False) for name in PROJECTIONS),
    ("in_proj_bias", tuple(f"{name}.bias" for name in PROJECTIONS), None),
)
"""The names of `nn.MultiheadAttention`, ours that each stands for, and whether that holds where it is packed."""


def _packed_names(module: nn.Module, state_dict: dict[str, Any], prefix: str, _metadata: Any) -> None:
    """The state dict under the names of `nn.MultiheadAttention`; left alone where a library has its own tensors."""
    for whole, parts, packed in _NAMES:
        values = [state_dict.get(prefix + part) for part in parts]
        if packed in (None, cast(OpenAttention, module).packed) and all(type(v) in _PLAIN for v in values):
            for part in parts:
                del state_dict[prefix + part]
            state_dict[prefix + whole] = torch.cat(cast(list[Tensor], values))


_PLAIN = (Tensor, nn.Parameter)


def _heads(x: Tensor, heads: int) -> Tensor:
    """`(n, length, e)` -> `(n, heads, length, e / heads)`."""
    return x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)


def _thirds(packed: nn.Parameter | None) -> tuple[nn.Parameter | None, ...]:
    """The parts for query, key and value: in the same memory."""
    if packed is None:
        return (None, None, None)
    return tuple(nn.Parameter(part, packed.requires_grad) for part in packed.detach().chunk(3))


def _linear(weight: Tensor | None, bias: Tensor | None) -> nn.Linear:
    """A linear layer around parameters."""
    assert weight is not None
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight, layer.bias = weight, bias  # type: ignore[assignment]
    return layer


class OpenWindowAttention(nn.Module):
    """torchvision's `ShiftedWindowAttention` and its second version, calling `qkv` and `proj`; same state dict."""

    qkv: nn.Linear
    proj: nn.Linear
    window_size: list[int]
    shift_size: list[int]
    num_heads: int
    attention_dropout: float
    dropout: float

    def __init__(self, original: nn.Module) -> None:
        """Take over everything of `original`."""
        super().__init__()
        self.__dict__ = {k: (v.copy() if isinstance(v, dict) else v) for k, v in original.__dict__.items()}
        self._position_bias = cast(Callable[[nn.Module], Tensor], type(original).get_relative_position_bias)  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """`(n, h, w, c)` to the same: attention inside windows, every second time shifted by half a window."""
        height, width, channels = x.shape[1:]
        wh, ww = self.window_size
        x = F.pad(x, (0, 0, 0, -width % ww, 0, -height % wh))
        padded = x.shape[1:3]
        shift = [0 if w >= p else s for s, w, p in zip(self.shift_size, self.window_size, padded, strict=True)]
        x = x.roll((-shift[0], -shift[1]), (1, 2))
        x = self._windows(x)  # (n * windows, wh * ww, c)
        q, k, v = self._queries(x)
        if "logit_scale" in self._parameters:  # the second version: cosines, scaled
            scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
            scores = scores * cast(Tensor, self.logit_scale).clamp(max=math.log(100.0)).exp()
        else:
            scores = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)
        scores = scores + self._position_bias(self)
        if any(shift):
            mask = self._shift_mask(x, padded, shift)  # (windows, 1, wh * ww, wh * ww)
            scores = (scores.view(-1, len(mask), *scores.shape[1:]) + mask).flatten(0, 1)
        weights = F.dropout(scores.softmax(-1), self.attention_dropout, self.training)
        y = self.proj((weights @ v).transpose(1, 2).flatten(2))
        y = F.dropout(y, self.dropout, self.training)
        y = (
            y.view(-1, padded[0] // wh, padded[1] // ww, wh, ww, channels)
            .transpose(2, 3)
            .reshape(-1, *padded, channels)
        )
        return y.roll((shift[0], shift[1]), (1, 2))[:, :height, :width].contiguous()

    def _windows(self, x: Tensor) -> Tensor:
        """`(n, h, w, c)` -> `(n * windows, wh * ww, c)`."""
        n, height, width, channels = x.shape
        wh, ww = self.window_size
        x = x.view(n, height // wh, wh, width // ww, ww, channels)
        return x.transpose(2, 3).reshape(-1, wh * ww, channels)

    def _queries(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, each `(n * windows, heads, wh * ww, d)`."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        if "logit_scale" in self._parameters and self.qkv.bias is not None:
            k = k - self.qkv.bias.chunk(3)[1]  # keys have no bias in the second version, whatever the layer's says
        return _heads(q, self.num_heads), _heads(k, self.num_heads), _heads(v, self.num_heads)

    def _shift_mask(self, x: Tensor, padded: torch.Size, shift: list[int]) -> Tensor:
        """-100 between positions that only the roll made neighbours, else 0."""
        regions = x.new_zeros((1, *padded, 1))
        rows, columns = (
            (slice(0, -window), slice(-window, -by), slice(-by, None))
            for window, by in zip(self.window_size, shift, strict=True)
        )
        for number, (row, column) in enumerate((row, column) for row in rows for column in columns):
            regions[:, row, column] = number
        regions = self._windows(regions)
        return (regions != regions.transpose(1, 2)).to(x.dtype).mul(-100.0).unsqueeze(1)
