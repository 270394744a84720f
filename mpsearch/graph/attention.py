"""Attention whose projections are layers: each is called, and thus seen, priced and quantized like any other.

torch's and torchvision's attention multiplies by the weights of projections that it never calls, some packed into one
matrix. `open_attention` puts modules in their place that compute the same and call a layer for each projection:

- `nn.MultiheadAttention`: `q_proj`, `k_proj`, `v_proj`, `out_proj`; its state dict keeps the packed names and tensors;
- torchvision's shifted windows (Swin, Swin V2): `qkv`, `proj`, which were there.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

PROJECTIONS = ("q_proj", "k_proj", "v_proj")


def open_attention(model: nn.Module, layers: Iterable[str] | None = None) -> nn.Module:
    """`model` with its attention opened; a copy that shares its parameters, or itself where nothing is to open.

    Attention with a forward of its own (a subclass) stays as it is.

    Args:
        model: any module.
        layers: open only attention that stands beside or around one of these layers; default: all. What stands beside
            counts, because torch's encoder layer computes all of it in one kernel where its attention is not opened.
    """
    names = None if layers is None else list(layers)

    def beside(attention: str) -> bool:
        parent, dot, _ = attention.rpartition(".")
        return names is None or any(name.startswith(parent + dot) for name in names)

    opened = {name for name, module in model.named_modules() if _form(module) and beside(name)}
    if not opened:
        return model
    # Handed to deepcopy as copied already: other modules around the same parameters.
    model = copy.deepcopy(model, {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]})
    twins = {
        module: form(module)
        for name, module in model.named_modules()
        if name in opened and (form := _form(module)) is not None
    }
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
        y, weights = attend(
            self.q_proj(query),
            self.k_proj(key),
            self.v_proj(value),
            self.num_heads,
            self.batch_first,
            self.bias_k,
            self.bias_v,
            self.add_zero_attn,
            attn_mask,
            key_padding_mask,
            self.dropout if self.training else 0.0,
            need_weights,
            average_attn_weights,
        )
        return self.out_proj(y), weights

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
    """The state dict under the names of `nn.MultiheadAttention`.

    Left alone: the variables themselves (`keep_vars=True`), which only the projections have, and tensors of a library.
    """
    for whole, parts, packed in _NAMES:
        values = [state_dict.get(prefix + part) for part in parts]
        if packed in (None, cast(OpenAttention, module).packed) and all(type(value) is Tensor for value in values):
            for part in parts:
                del state_dict[prefix + part]
            state_dict[prefix + whole] = torch.cat(cast(list[Tensor], values))


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
        y = attend_in_windows(
            self.qkv(into_windows(x, self.window_size, self.shift_size)),
            x,
            self._position_bias(self),
            self._parameters.get("logit_scale"),
            self.qkv.bias,
            self.num_heads,
            self.window_size,
            self.shift_size,
            self.attention_dropout if self.training else 0.0,
        )
        y = F.dropout(self.proj(y), self.dropout, self.training)
        return out_of_windows(y, x, self.window_size, self.shift_size)


# Shapes and masks decide what these compute: torch.fx takes each as one operation, and can trace what is around it.


@torch.fx.wrap
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    batch_first: bool,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero: bool,
    attn_mask: Tensor | None,
    padding: Tensor | None,
    dropout: float,
    need_weights: bool,
    average_weights: bool,
) -> tuple[Tensor, Tensor | None]:
    """softmax(q k^T / sqrt(d) + mask) v for each head, not yet projected, and the weights if asked for."""
    batched = q.dim() == 3
    q, k, v = (x if batched and batch_first else x.transpose(0, 1) if batched else x.unsqueeze(0) for x in (q, k, v))
    n, length = k.shape[:2]
    if bias_k is not None and bias_v is not None:
        k, v = torch.cat([k, bias_k.expand(n, 1, -1)], 1), torch.cat([v, bias_v.expand(n, 1, -1)], 1)
    if add_zero:
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
    added = k.shape[1] - length  # key positions that no mask knows of
    q, k, v = (split_heads(x, heads) for x in (q, k, v))  # (n, heads, l or s + added, d)
    mask = None
    if attn_mask is not None:
        mask = _additive(attn_mask, q.dtype, added)
        mask = mask if mask.dim() == 2 else mask.view(-1, heads, *mask.shape[1:])
    if padding is not None:
        blocked = _additive(padding, q.dtype, added)[..., None, None, :]
        mask = blocked if mask is None else mask + blocked
    weights = None
    if need_weights:
        scores = q / math.sqrt(q.shape[-1]) @ k.transpose(-2, -1)
        weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
        y = weights @ v
        weights = weights.mean(1) if average_weights else weights
        weights = weights if batched else weights.squeeze(0)
    else:
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout)
    y = y.transpose(1, 2).flatten(2)
    return (y if batched and batch_first else y.transpose(0, 1) if batched else y.squeeze(0)), weights


def _additive(mask: Tensor, dtype: torch.dtype, added: int) -> Tensor:
    """A mask as what is added to scores, with nothing for the `added` last keys."""
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -math.inf)
    return F.pad(mask, (0, added))


def split_heads(x: Tensor, heads: int) -> Tensor:
    """`(n, length, e)` -> `(n, heads, length, e / heads)`."""
    return x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)


@torch.fx.wrap
def into_windows(x: Tensor, window: list[int], shift: list[int]) -> Tensor:
    """`(n, h, w, c)`, padded to whole windows and rolled -> `(n * windows, wh * ww, c)`."""
    padded = F.pad(x, (0, 0, 0, -x.shape[2] % window[1], 0, -x.shape[1] % window[0]))
    rows, columns = _effective(shift, window, padded.shape)
    return _windows(padded.roll((-rows, -columns), (1, 2)), window)


def _windows(x: Tensor, window: list[int]) -> Tensor:
    n, height, width, channels = x.shape
    x = x.view(n, height // window[0], window[0], width // window[1], window[1], channels)
    return x.transpose(2, 3).reshape(-1, window[0] * window[1], channels)


def _effective(shift: list[int], window: list[int], padded: Sequence[int]) -> list[int]:
    """The shift along rows and columns: none where one window holds them all."""
    return [0 if w >= size else s for s, w, size in zip(shift, window, padded[1:3], strict=True)]


@torch.fx.wrap
def attend_in_windows(
    qkv: Tensor,
    x: Tensor,
    position_bias: Tensor,
    logit_scale: Tensor | None,
    bias: Tensor | None,
    heads: int,
    window: list[int],
    shift: list[int],
    dropout: float,
) -> Tensor:
    """Attention of projected windows `(n * windows, wh * ww, 3 c)` -> `(n * windows, wh * ww, c)`.

    Args:
        x: `(n, h, w, c)`, what was cut into windows: for its shape.
        logit_scale: of cosine attention, the second version's.
        bias: of the projection; keys have none in the second version, whatever the layer's says.
    """
    q, k, v = qkv.chunk(3, dim=-1)
    if logit_scale is not None and bias is not None:
        k = k - bias.chunk(3)[1]
    q, k, v = (split_heads(part, heads) for part in (q, k, v))
    if logit_scale is not None:
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        scores = scores * logit_scale.clamp(max=math.log(100.0)).exp()
    else:
        scores = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)
    scores = scores + position_bias
    padded = _padded(x, window)
    shift = _effective(shift, window, padded)
    if any(shift):
        mask = _shift_mask(x, padded, window, shift)  # (windows, 1, wh * ww, wh * ww)
        scores = (scores.view(-1, len(mask), *scores.shape[1:]) + mask).flatten(0, 1)
    return (F.dropout(scores.softmax(-1), dropout) @ v).transpose(1, 2).flatten(2)


def _shift_mask(x: Tensor, padded: Sequence[int], window: list[int], shift: list[int]) -> Tensor:
    """-100 between positions that only the roll made neighbours, else 0."""
    regions = x.new_zeros((1, *padded[1:3], 1))
    rows, columns = ((slice(0, -w), slice(-w, -s), slice(-s, None)) for w, s in zip(window, shift, strict=True))
    for number, (row, column) in enumerate((row, column) for row in rows for column in columns):
        regions[:, row, column] = number
    regions = _windows(regions, window)
    return (regions != regions.transpose(1, 2)).to(x.dtype).mul(-100.0).unsqueeze(1)


@torch.fx.wrap
def out_of_windows(y: Tensor, x: Tensor, window: list[int], shift: list[int]) -> Tensor:
    """What `into_windows` made of `x`, undone."""
    n, height, width, channels = _padded(x, window)
    y = y.view(n, height // window[0], width // window[1], window[0], window[1], channels)
    y = y.transpose(2, 3).reshape(n, height, width, channels)
    rows, columns = _effective(shift, window, (n, height, width))
    return y.roll((rows, columns), (1, 2))[:, : x.shape[1], : x.shape[2]].contiguous()


def _padded(x: Tensor, window: list[int]) -> tuple[int, int, int, int]:
    n, height, width, channels = x.shape
    return n, height + -height % window[0], width + -width % window[1], channels
