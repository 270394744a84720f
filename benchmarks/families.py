"""Families of networks of other people, each with random weights and BatchNorm statistics away from 0 and 1.

`FAMILIES[name]()` gives, for each network, a function that makes it in eval mode, and a batch for it: a tensor, a tuple
of arguments, or a dict of named ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

Built = tuple[nn.Module, Any]
Make = Callable[[], Built]

BATCH = 4

# Up to four architectures of a module of timm, the smallest of each name; 91 of the 98 modules of timm 1.0.31.
TIMM = [
    "halonet_h1",
    "eca_botnext26ts_256",
    "lambda_resnet26t",
    "haloregnetz_b",
    "test_byobnet",
    "mobileone_s1",
    "gernet_s",
    "repvgg_a0",
    "cait_xxs24_224",
    "coat_tiny",
    "convit_tiny",
    "convmixer_768_32",
    "test_convnext",
    "test_convnext3",
    "test_convnext2",
    "convnext_zepto_rms",
    "cpubone_nano",
    "crossvit_tiny_240",
    "csatv2_21m",
    "cs3darknet_focus_s",
    "darknet17",
    "cspresnext50",
    "darknet21",
    "cspnext_tiny",
    "davit_tiny",
    "deit_tiny_patch16_224",
    "deit3_small_patch16_224",
    "densenet121",
    "densenetblur121d",
    "densenet169",
    "densenet201",
    "dla46x_c",
    "dla46_c",
    "dla60x_c",
    "dla34",
    "dpn48b",
    "dpn68",
    "dpn68b",
    "dpn92",
    "edgenext_xx_small",
    "efficientformer_l1",
    "efficientformerv2_s0",
    "test_efficientnet",
    "mobilenetv2_035",
    "mnasnet_small",
    "tinynet_e",
    "efficientvim_m1",
    "efficientvit_b0",
    "efficientvit_m0",
    "vit_tiny_patch16_dinov3_qkvb",
    "eva02_tiny_patch14_224",
    "fasternet_t0",
    "fastvit_t8",
    "focalnet_tiny_srf",
    "gcvit_xxtiny",
    "ghostnet_050",
    "ghostnetv3_050",
    "ghostnetv2_100",
    "hardcorenas_b",
    "hgnetv2_b0",
    "hgnet_tiny",
    "hiera_tiny_224",
    "sam2_hiera_small",
    "hieradet_small",
    "hrnet_w18_small",
    "iformer_t",
    "inception_next_atto",
    "inception_v3",
    "inception_v4",
    "lcnetv2_small",
    "levit_128s",
    "lowformer_b0",
    "test_mambaout",
    "mambaout_femto",
    "test_coatnet",
    "test_maxvit",
    "maxvit_pico_rw_256",
    "coatnet_pico_rw_224",
    "poolformerv2_s12",
    "poolformer_s12",
    "caformer_s18",
    "convformer_s18",
    "gmlp_ti16_224",
    "gmixer_12_224",
    "resmlp_12_224",
    "mixer_s16_224",
    "mobilenetv3_small_050",
    "lcnet_035",
    "mobilenetv4_conv_small_035",
    "tf_mobilenetv3_small_075",
    "mobilevit_xxs",
    "mobilevitv2_050",
    "mvitv2_tiny",
    "nest_tiny",
    "nextvit_small",
    "test_nfnet",
    "nf_regnet_b0",
    "eca_nfnet_l0",
    "nfnet_l0",
    "pit_ti_224",
    "pvt_v2_b0",
    "rdnet_tiny",
    "regnetx_002",
    "regnety_002",
    "regnetz_005",
    "regnetv_040",
    "repghostnet_050",
    "repvit_m1",
    "res2next50",
    "res2net50_14w_8s",
    "res2net50d",
    "resnest14d",
    "resnest26d",
    "resnest50d_1s4x24d",
    "test_resnet",
    "resnet10t",
    "resnet14t",
    "resnet18",
    "resnetv2_18",
    "rexnet_100",
    "rexnetr_100",
    "selecsls42",
    "selecsls60",
    "selecsls42b",
    "selecsls60b",
    "legacy_seresnet18",
    "sequencer2d_s",
    "shvit_s1",
    "skresnet18",
    "skresnet34",
    "skresnet50",
    "skresnet50d",
    "starnet_s050",
    "swiftformer_xs",
    "swin_tiny_patch4_window7_224",
    "swinv2_tiny_window16_256",
    "swinv2_cr_tiny_224",
    "tiny_vit_5m_224",
    "tnt_s_legacy_patch16_224",
    "tresnet_m",
    "twins_svt_small",
    "visformer_tiny",
    "test_vit",
    "test_vit2",
    "test_vit3",
    "test_vit4",
    "vit_tiny_r_s16_p8_224",
    "test_vit_relpos",
    "vit_srelpos_small_patch16_224",
    "vitamin_small_224",
    "volo_d1_224",
    "ese_vovnet19b_slim_dw",
    "vovnet39a",
    "eca_vovnet39b",
    "vovnet57a",
    "legacy_xception",
    "xception41p",
    "xception41",
    "xception65p",
    "xception65",
    "xcit_nano_12_p8_224",
    "csatv2",
    "vgg11",
    "inception_resnet_v2",
    "nasnetalarge",
    "pnasnet5large",
]

TORCHVISION_SIZES = {"inception_v3": 299, "maxvit_t": 224, "vit_h_14": 56}
"""Pixels where 64 do not do: auxiliary classifiers, windows of a fixed number, patches of 14."""

TIMM_SIZES = (96, 128)
"""Pixels that are tried before the size that a network of timm is made for: in a smaller image the layers are the
same."""


def prepared(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in eval mode, its normalization layers as if they had seen data: a wrong fold is then seen."""
    torch.manual_seed(seed)
    for module in model.modules():
        if (
            isinstance(module, nn.modules.batchnorm._BatchNorm)
            and module.running_mean is not None
            and module.running_var is not None
        ):
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            if module.affine:
                nn.init.uniform_(module.weight, 0.7, 1.3)
                nn.init.normal_(module.bias, std=0.2)
    return model.eval()


@torch.no_grad()
def finding_some(model: nn.Module, images: list[Tensor]) -> nn.Module:
    """A detector of random weights as if it had been trained: what it finds depends on the image.

    Each layer's output is brought to vary by 1 over an image, where it else fades from layer to layer until all boxes
    have one score, and the threshold of scores lets half of the boxes pass.
    """
    seen: set[nn.Module] = set()

    def spread(layer: Any, _: Any, y: Tensor) -> Tensor:
        rows = y.movedim(1, -1).flatten(0, -2)
        if layer in seen or len(rows) < 16:  # an attention of channels, say, of one number an image
            return y
        seen.add(layer)
        bias = layer.bias.view(-1, *[1] * (y.dim() - 2)) if isinstance(layer.bias, Tensor) else torch.zeros(())
        by = rows.std(0).mean().clamp_min(1e-6)
        layer.weight.data /= by
        return (y - bias) / by + bias

    layers = [layer for layer in model.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    hooks = [layer.register_forward_hook(spread) for layer in layers]
    model(images)
    for hook in hooks:
        hook.remove()
    decides: Any = next(module for module in model.modules() if hasattr(module, "score_thresh"))
    decides.score_thresh = 0.0
    scores = torch.cat([found["scores"] for found in model(images)]).sort().values
    middle = len(scores) // 2
    decides.score_thresh = float(scores[middle - 1 : middle + 1].mean())
    return model


def _images(size: int, batch: int = BATCH, channels: int = 3) -> Tensor:
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def _runs(model: nn.Module, x: Tensor) -> bool:
    try:
        model(x)
    except Exception:  # whatever a network raises on a size that it is not made for
        return False
    return True


def _smallest_first(module: Any) -> list[str]:
    """The networks of a module of torchvision, by their number of parameters."""
    from torchvision.models import get_model_weights, list_models

    def parameters(name: str) -> int:
        return max((int(weights.meta["num_params"]) for weights in get_model_weights(name)), default=0)

    return sorted(list_models(module=module), key=parameters)


def torchvision() -> Mapping[str, Make]:
    """All classification models of torchvision."""
    import torchvision

    def make(name: str) -> Built:
        size = TORCHVISION_SIZES.get(name, 64)
        options: dict[str, Any] = {"image_size": size} if name.startswith("vit") else {}
        torch.manual_seed(0)
        return prepared(torchvision.models.get_model(name, weights=None, **options)), _images(size)

    return {name: partial(make, name) for name in _smallest_first(torchvision.models)}


def torchvision_dense() -> Mapping[str, Make]:
    """All segmentation, detection and video models of torchvision."""
    import torchvision

    def make(name: str, kind: str) -> Built:
        torch.manual_seed(0)
        options: dict[str, Any] = {} if kind == "video" else {"weights_backbone": None}
        if kind == "detection" and not name.startswith("ssd"):  # which else resizes every image to 800 pixels
            options |= {"min_size": 128, "max_size": 128}
        if "rcnn" in name:  # whose heads else see 1,000 proposals an image
            options |= {"rpn_pre_nms_top_n_test": 64, "rpn_post_nms_top_n_test": 32, "box_detections_per_img": 8}
        elif kind == "detection":
            options |= {"detections_per_img": 20}
        model = prepared(torchvision.models.get_model(name, weights=None, **options))
        if kind == "detection":
            images = [*_images(128, 2)]
            return finding_some(model, images), (images,)
        if kind == "video":
            whole = name.startswith(("mvit", "s3d"))  # which take no smaller clip
            return model, torch.randn(1, 3, 16, 224, 224) if whole else torch.randn(2, 3, 8, 64, 64)
        return model, _images(64, 2)

    return {
        name: partial(make, name, kind)
        for kind in ("segmentation", "detection", "video")
        for name in _smallest_first(getattr(torchvision.models, kind))
    }


def timm() -> Mapping[str, Make]:
    """`TIMM`: small architectures of 91 of the 98 modules of timm 1.0.31."""
    import timm

    def make(name: str) -> Built:
        torch.manual_seed(0)
        model = timm.create_model(name, pretrained=False)
        config: dict[str, Any] = model.default_cfg
        prepared(model)
        whole = config["input_size"][-1]
        for size in () if config.get("fixed_input_size") else TIMM_SIZES:
            if size < whole and _runs(model, _images(size, 2)):
                return model, _images(size, 2)
        return model, _images(whole, 2)

    return {name: partial(make, name) for name in TIMM}


# ------------------------------------------------------------------------------------------------ transformers

_TEXT = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_DECODER = {**_TEXT, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0}
_T5 = {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
_BART = {
    "vocab_size": 99,
    "d_model": 32,
    **{f"{side}_layers": 2 for side in ("encoder", "decoder")},
    **{f"{side}_attention_heads": 4 for side in ("encoder", "decoder")},
    **{f"{side}_ffn_dim": 48 for side in ("encoder", "decoder")},
    "max_position_embeddings": 64,
}
_VISION = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_PATCHES = {**_VISION, "image_size": 32, "patch_size": 8}
_WAV = {**_TEXT, "conv_dim": (16, 16), "conv_stride": (4, 4), "conv_kernel": (8, 8), "num_conv_pos_embeddings": 8}
_WAV |= {"num_conv_pos_embedding_groups": 2, "num_feat_extract_layers": 2}

TRANSFORMERS: Mapping[str, tuple[str, Mapping[str, Any], str]] = {
    # encoders of text
    "bert": ("BertForSequenceClassification", _TEXT, "ids"),
    "roberta": ("RobertaForSequenceClassification", _TEXT, "ids"),
    "electra": ("ElectraForSequenceClassification", {**_TEXT, "embedding_size": 16}, "ids"),
    "distilbert": ("DistilBertForSequenceClassification", {"vocab_size": 99, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}, "ids"),
    "albert": ("AlbertForSequenceClassification", {**_TEXT, "embedding_size": 16}, "ids"),
    "deberta-v2": ("DebertaV2ForSequenceClassification", {**_TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}, "ids"),
    "deberta": ("DebertaForSequenceClassification", {**_TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}, "ids"),
    "mobilebert": ("MobileBertForSequenceClassification", {**_TEXT, "embedding_size": 32, "intra_bottleneck_size": 32, "true_hidden_size": 32}, "ids"),
    "squeezebert": ("SqueezeBertForSequenceClassification", {**_TEXT, "embedding_size": 32}, "ids"),
    "mpnet": ("MPNetForSequenceClassification", _TEXT, "ids"),
    "camembert": ("CamembertForSequenceClassification", _TEXT, "ids"),
    "ernie": ("ErnieForSequenceClassification", _TEXT, "ids"),
    "nystromformer": ("NystromformerForSequenceClassification", {**_TEXT, "num_landmarks": 4, "segment_means_seq_len": 8}, "ids"),
    "fnet": ("FNetForSequenceClassification", {k: v for k, v in _TEXT.items() if k != "num_attention_heads"}, "ids"),
    "modernbert": ("ModernBertForSequenceClassification", {**_TEXT, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}, "ids"),
    # decoders
    "gpt2": ("GPT2LMHeadModel", {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4}, "ids"),
    "gpt_neo": ("GPTNeoForCausalLM", {"vocab_size": 99, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}, "ids"),
    "gpt_neox": ("GPTNeoXForCausalLM", _TEXT, "ids"),
    "gptj": ("GPTJForCausalLM", {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}, "ids"),
    "opt": ("OPTForCausalLM", {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48, "word_embed_proj_dim": 32}, "ids"),
    "bloom": ("BloomForCausalLM", {"vocab_size": 99, "hidden_size": 32, "n_layer": 2, "n_head": 4}, "ids"),
    "llama": ("LlamaForCausalLM", _DECODER, "ids"),
    "mistral": ("MistralForCausalLM", _DECODER, "ids"),
    "qwen2": ("Qwen2ForCausalLM", _DECODER, "ids"),
    "qwen3": ("Qwen3ForCausalLM", {**_DECODER, "head_dim": 8}, "ids"),
    "gemma": ("GemmaForCausalLM", {**_DECODER, "head_dim": 8}, "ids"),
    "gemma2": ("Gemma2ForCausalLM", {**_DECODER, "head_dim": 8}, "ids"),
    "phi": ("PhiForCausalLM", _DECODER, "ids"),
    "phi3": ("Phi3ForCausalLM", _DECODER, "ids"),
    "falcon": ("FalconForCausalLM", {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}, "ids"),
    "stablelm": ("StableLmForCausalLM", _DECODER, "ids"),
    "olmo": ("OlmoForCausalLM", _DECODER, "ids"),
    "smollm3": ("SmolLM3ForCausalLM", _DECODER, "ids"),
    # encoder-decoders
    "t5": ("T5ForConditionalGeneration", _T5, "pairs"),
    "mt5": ("MT5ForConditionalGeneration", _T5, "pairs"),
    "bart": ("BartForConditionalGeneration", _BART, "pairs"),
    "pegasus": ("PegasusForConditionalGeneration", _BART, "pairs"),
    "marian": ("MarianMTModel", {**_BART, "pad_token_id": 0}, "pairs"),
    "mbart": ("MBartForConditionalGeneration", _BART, "pairs"),
    # vision
    "vit": ("ViTForImageClassification", _PATCHES, "pixels"),
    "deit": ("DeiTForImageClassification", _PATCHES, "pixels"),
    "beit": ("BeitForImageClassification", _PATCHES, "pixels"),
    "dinov2": ("Dinov2ForImageClassification", {**_PATCHES, "mlp_ratio": 2}, "pixels"),
    "swin": ("SwinForImageClassification", {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4}, "pixels"),
    "convnext": ("ConvNextForImageClassification", {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}, "pixels"),
    "resnet": ("ResNetForImageClassification", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}, "pixels"),
    "segformer": ("SegformerForSemanticSegmentation", {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [8, 16], "patch_sizes": [7, 3], "strides": [4, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2], "decoder_hidden_size": 16}, "pixels"),
    "mobilevit": ("MobileViTForImageClassification", {"hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 24, 32, 48], "image_size": 64}, "pixels64"),
    "clip-vision": ("CLIPVisionModel", _PATCHES, "pixels"),
    "siglip-vision": ("SiglipVisionModel", _PATCHES, "pixels"),
    # speech
    "whisper": ("WhisperForConditionalGeneration", {**_BART, "num_mel_bins": 8, "max_source_positions": 32, "max_target_positions": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}, "mel"),
    "wav2vec2": ("Wav2Vec2ForSequenceClassification", _WAV, "wave"),
    "hubert": ("HubertForSequenceClassification", _WAV, "wave"),
    "wavlm": ("WavLMForSequenceClassification", _WAV, "wave"),
    "audio-spectrogram-transformer": ("ASTForAudioClassification", {**_VISION, "patch_size": 4, "frequency_stride": 4, "time_stride": 4, "max_length": 32, "num_mel_bins": 16}, "spectrogram"),
}  # fmt: skip
"""Name -> class, the settings of its config (tiny), and what it is called with."""


def _batch(kind: str) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(1)

    def ids(length: int) -> Tensor:
        return torch.randint(3, 99, (BATCH, length), generator=random)

    def noise(*shape: int) -> Tensor:
        return torch.randn(BATCH, *shape, generator=random)

    match kind:
        case "ids":
            return {"input_ids": ids(8), "attention_mask": torch.ones(BATCH, 8, dtype=torch.long)}
        case "pairs":
            return {"input_ids": ids(8), "decoder_input_ids": ids(6)}
        case "pixels":
            return {"pixel_values": noise(3, 32, 32)}
        case "pixels64":
            return {"pixel_values": noise(3, 64, 64)}
        case "mel":
            return {"input_features": noise(8, 64), "decoder_input_ids": ids(6)}
        case "wave":
            return {"input_values": noise(400)}
        case "spectrogram":
            return {"input_values": noise(32, 16)}
    raise AssertionError(kind)


def transformers() -> Mapping[str, Make]:
    """`TRANSFORMERS`: tiny encoders, decoders, encoder-decoders, and networks of vision and speech."""
    import transformers

    def make(name: str) -> Built:
        architecture, settings, kind = TRANSFORMERS[name]
        kind_of_model = getattr(transformers, architecture)
        torch.manual_seed(0)
        model = kind_of_model(kind_of_model.config_class(**settings))
        model.config.use_cache = False  # .eval() leaves it on, and an export is of one pass
        return prepared(model), _batch(kind)

    return {name: partial(make, name) for name in TRANSFORMERS}


FAMILIES: dict[str, Callable[[], Mapping[str, Make]]] = {
    "torchvision": torchvision,
    "torchvision-dense": torchvision_dense,
    "timm": timm,
    "transformers": transformers,
}
