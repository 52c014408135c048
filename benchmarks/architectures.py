"""The architectures of benchmarks/coverage.py: public ones by name, random weights, small inputs.

`architectures:NAME` is the factory of each, for `gpuopt compile`. Weights are random, so three things
are done to make the figures those of a network rather than of its initialisation. BatchNorm sees
data, as training does, because without it the signals of a deep network fade to nothing. Its biases
are 0.5: with 0 a deep network of random weights and ReLU is chaotic (Schoenholz et al., "Deep
Information Propagation", ICLR 2017); in a ResNet-50, noise of 1 % at the input is 5 dB at the output,
and rounding the input to FP16 35 dB, so no precision could be told from another. And what is
initialised to zero to ease training (gates, residual scales) is not, because a branch that adds
nothing would be compared with nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

IMAGE = ("image:3x64x64",)
TOKENS = ("input_ids:16:int64", "attention_mask:16:int64")


@dataclass(frozen=True)
class Architecture:
    """A network to compile.

    Attributes:
        source: the package it comes from, or `own`.
        task: what it is for.
        name: its name there.
        inputs: NAME:SHAPE[:DTYPE] without the batch, in forward's order.
        build: makes it.
        bounds: smallest and largest value (integers: one past the largest) of an input, by name.
        refused: the construct for which the compilation has to end in an error; empty: it has to pass.
        batch: whether the batch is dynamic; else it is 1.
    """

    source: str
    task: str
    name: str
    inputs: tuple[str, ...]
    build: Callable[[], nn.Module]
    bounds: tuple[tuple[str, float, float], ...] = (("image", -1.0, 1.0),)
    refused: str = ""
    batch: bool = True

    @property
    def key(self) -> str:
        """Its name as a factory."""
        return re.sub(r"\W", "_", f"{self.source}_{self.name}")


def _trained(model: nn.Module, inputs: tuple[str, ...]) -> nn.Module:
    """BatchNorm with statistics of its signals, no branch that is zero; in evaluation mode."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            continue
        if not parameter.any():
            nn.init.constant_(parameter, 0.5) if parameter.ndim <= 1 else nn.init.normal_(parameter, std=0.02)
        elif parameter.ndim <= 1 and parameter.numel() and 0 < float(parameter.detach().abs().max()) < 1e-3:
            nn.init.constant_(parameter, 0.1)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if norms:
        model.eval()
        for norm in norms:
            norm.train()
            norm.momentum = None
            if norm.bias is not None:
                nn.init.constant_(norm.bias, 0.5)
        shape = [int(size) for size in inputs[0].split(":")[1].split("x")]
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for _ in range(2):
                model(torch.rand(8, *shape, generator=generator) * 2 - 1)
    return model.eval()


class Chosen(nn.Module):
    """A model whose outputs are those of the named keys or positions."""

    def __init__(self, model: nn.Module, *keys: str | int) -> None:
        super().__init__()
        self.model = model
        self.keys = keys

    def forward(self, image: Tensor) -> Any:
        found = self.model(image)
        chosen = tuple(found[key] for key in self.keys)
        return chosen[0] if len(chosen) == 1 else chosen


class Listed(nn.Module):
    """A model that takes a batch of images and gives a list of feature maps."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        found = self.model(image)
        return tuple(found.values()) if isinstance(found, dict) else tuple(found)


class Text(nn.Module):
    """A transformer of token ids and their mask; gives its first output."""

    def __init__(self, model: nn.Module, **fixed: Any) -> None:
        super().__init__()
        self.model = model
        self.fixed = fixed

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, return_dict=False, **self.fixed)[0]


class Ids(nn.Module):
    """A transformer of token ids alone."""

    def __init__(self, model: nn.Module, **fixed: Any) -> None:
        super().__init__()
        self.model = model
        self.fixed = fixed

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, return_dict=False, **self.fixed)[0]


class Values(nn.Module):
    """A transformer of pixels, samples or features, under the argument that it calls them."""

    def __init__(self, model: nn.Module, argument: str = "pixel_values") -> None:
        super().__init__()
        self.model = model
        self.argument = argument

    def forward(self, image: Tensor) -> Tensor:
        return self.model(**{self.argument: image}, return_dict=False)[0]


# -- torchvision


def _torchvision(name: str, inputs: tuple[str, ...], **options: Any) -> nn.Module:
    import torchvision

    model = torchvision.models.get_model(name, weights=None, **options)
    if name in ("googlenet", "inception_v3"):
        model.aux_logits = False
    return _trained(model, inputs)


def _tv(name: str, task: str = "classification", shape: str = "3x64x64", **options: Any) -> Architecture:
    inputs = (f"image:{shape}",)
    return Architecture("torchvision", task, name, inputs, partial(_torchvision, name, inputs, **options))


def _segmentation(name: str) -> nn.Module:
    import torchvision

    model = torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=8)
    return Chosen(_trained(model, IMAGE), "out")


def _fpn(backbone: str) -> nn.Module:
    from torchvision.models.detection import backbone_utils

    build = backbone_utils.mobilenet_backbone if "mobilenet" in backbone else backbone_utils.resnet_fpn_backbone
    named = {"fpn": True} if "mobilenet" in backbone else {}
    return Listed(_trained(build(backbone_name=backbone, weights=None, trainable_layers=5, **named), IMAGE))


def _ssd_backbone() -> nn.Module:
    from torchvision.models.detection import ssdlite320_mobilenet_v3_large

    return Listed(_trained(ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None).backbone, IMAGE))


def _retinanet_heads() -> nn.Module:
    from torchvision.models.detection import retinanet_resnet50_fpn

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            found = retinanet_resnet50_fpn(weights=None, weights_backbone=None, num_classes=4)
            self.backbone, self.head = found.backbone, found.head

        def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
            found = self.head(list(self.backbone(image).values()))
            return found["cls_logits"], found["bbox_regression"]

    return _trained(Heads(), IMAGE)


def _swin() -> nn.Module:
    from torchvision.models import SwinTransformer

    return _trained(SwinTransformer([4, 4], 24, [2, 2, 2], [2, 4, 8], [4, 4], num_classes=16), IMAGE)


def _swin_v2() -> nn.Module:
    from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformer, SwinTransformerBlockV2

    return _trained(
        SwinTransformer(
            *([4, 4], 24, [2, 2, 2], [2, 4, 8], [4, 4]),
            num_classes=16,
            block=SwinTransformerBlockV2,
            downsample_layer=PatchMergingV2,
        ),
        IMAGE,
    )


def _vit() -> nn.Module:
    from torchvision.models import VisionTransformer

    return _trained(VisionTransformer(64, 16, 4, 4, 96, 192, num_classes=16), IMAGE)


def _maxvit() -> nn.Module:
    from torchvision.models import MaxVit

    return _trained(
        MaxVit((64, 64), 16, 2, [16, 32], [1, 1], 16, 0.0, num_classes=16),
        IMAGE,
    )


class _Flow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        from torchvision.models.optical_flow import raft_small

        self.model = raft_small(weights=None)

    def forward(self, image: Tensor) -> Tensor:
        return self.model(image[:, :3], image[:, 3:], num_flow_updates=2)[-1]


TORCHVISION = (
    _tv("resnet18"),
    _tv("resnet50"),
    _tv("squeezenet1_1"),
    _tv("mnasnet0_5"),
    _tv("mobilenet_v2"),
    _tv("mobilenet_v3_small"),
    _tv("mobilenet_v3_large"),
    _tv("shufflenet_v2_x0_5"),
    _tv("regnet_x_400mf"),
    _tv("regnet_y_400mf"),
    _tv("convnext_tiny"),
    Architecture("torchvision", "classification", "VisionTransformer", IMAGE, _vit),
    Architecture("torchvision", "classification", "SwinTransformer", IMAGE, _swin),
    Architecture("torchvision", "classification", "SwinTransformer V2", IMAGE, _swin_v2),
    Architecture("torchvision", "classification", "MaxVit", IMAGE, _maxvit),
    Architecture("torchvision", "segmentation", "fcn_resnet50", IMAGE, partial(_segmentation, "fcn_resnet50")),
    Architecture(
        "torchvision", "segmentation", "deeplabv3_mobilenet_v3_large", IMAGE,
        partial(_segmentation, "deeplabv3_mobilenet_v3_large"),
    ),
    Architecture(
        "torchvision", "segmentation", "lraspp_mobilenet_v3_large", IMAGE,
        partial(_segmentation, "lraspp_mobilenet_v3_large"),
    ),
    Architecture("torchvision", "detection", "resnet18 FPN", IMAGE, partial(_fpn, "resnet18")),
    Architecture("torchvision", "detection", "mobilenet_v3_large FPN", IMAGE, partial(_fpn, "mobilenet_v3_large")),
    Architecture("torchvision", "detection", "ssdlite320 backbone", IMAGE, _ssd_backbone),
    Architecture("torchvision", "detection", "retinanet_resnet50_fpn heads", IMAGE, _retinanet_heads),
    Architecture("torchvision", "optical flow", "raft_small", ("image:6x128x128",), _Flow),
    _tv("r3d_18", "video", "3x4x32x32"),
    _tv("mc3_18", "video", "3x4x32x32"),
    _tv("r2plus1d_18", "video", "3x4x32x32"),
    _tv("resnext50_32x4d"),
    _tv("densenet121"),
    _tv("googlenet", init_weights=False),
    _tv("inception_v3", shape="3x96x96", init_weights=False),
    _tv("efficientnet_v2_s"),
    _tv("efficientnet_b0"),
    _tv("alexnet", shape="3x96x96"),
    _tv("vgg11_bn"),
)  # fmt: skip


# -- timm


def _timm_model(name: str, inputs: tuple[str, ...], features: bool, **options: Any) -> nn.Module:
    import timm

    # Without weights of its own, dropout of whole paths plays no part; heads are small.
    common: dict[str, Any] = {"features_only": True} if features else {"num_classes": 16}
    model = _trained(timm.create_model(name, pretrained=False, **common, **options), inputs)
    return Listed(model) if features else model


def _timm(name: str, size: int = 64, task: str = "classification", **options: Any) -> Architecture:
    inputs = (f"image:3x{size}x{size}",)
    build = partial(_timm_model, name, inputs, task == "detection", **options)
    return Architecture("timm", task, name, inputs, build)


TIMM = (
    _timm("resnet10t"),
    _timm("resnet14t"),
    _timm("resnet26d"),
    _timm("seresnet18"),
    _timm("ecaresnet26t"),
    _timm("skresnet18"),
    _timm("resnest14d"),
    _timm("resnetv2_18"),
    _timm("dla46_c"),
    _timm("ese_vovnet19b_slim"),
    _timm("darknet17"),
    _timm("hardcorenas_a"),
    _timm("tinynet_e"),
    _timm("lcnet_050"),
    _timm("mobilenetv3_small_050"),
    _timm("mobilenetv4_conv_small"),
    _timm("mobileone_s0"),
    _timm("fbnetc_100"),
    _timm("spnasnet_100"),
    _timm("efficientnet_lite0"),
    _timm("tf_efficientnetv2_b0"),
    _timm("regnetx_002"),
    _timm("regnety_002"),
    _timm("repvgg_a0"),
    _timm("repvit_m0_9"),
    _timm("fasternet_t0"),
    _timm("starnet_s1"),
    _timm("nf_regnet_b0"),
    _timm("convnext_atto"),
    _timm("convnextv2_atto"),
    _timm("mambaout_femto"),
    _timm("vit_tiny_patch16_224", img_size=64, depth=4),
    _timm("deit_tiny_distilled_patch16_224", img_size=64, depth=4),
    _timm("vit_relpos_small_patch16_224", img_size=64, depth=4),
    _timm("beit_base_patch16_224", img_size=64, depth=4, embed_dim=96, num_heads=4),
    _timm("eva02_tiny_patch14_224", 56, img_size=56, depth=4),
    _timm("cait_xxs24_224", img_size=64, depth=4),
    _timm("pit_ti_224", img_size=64),
    _timm("convit_tiny", img_size=64, depth=4),
    _timm("visformer_tiny", img_size=64),
    _timm("mobilevit_xxs"),
    _timm("mobilevitv2_050"),
    _timm("efficientvit_b0"),
    _timm("efficientvit_m0", 128, img_size=128),
    _timm("edgenext_xx_small"),
    _timm("fastvit_t8"),
    _timm("poolformer_s12"),
    _timm("pvt_v2_b0"),
    _timm("mixer_s32_224", img_size=64),
    _timm("gmlp_s16_224", img_size=64),
    _timm("resmlp_12_224", img_size=64),
    _timm("resnet18", task="detection"),
    _timm("efficientnet_b0", task="detection"),
    _timm("res2net50_14w_8s"),
    _timm("halonet26t", 256),
    _timm("lambda_resnet26t", 128, img_size=128),
    _timm("botnet26t_256", 128, img_size=128),
    _timm("dpn48b"),
    _timm("densenet121"),
    _timm("cspresnet50"),
    _timm("cspdarknet53"),
    _timm("selecsls42"),
    _timm("ghostnet_050"),
    _timm("mixnet_s"),
    _timm("rexnet_100"),
    _timm("regnetz_005"),
    _timm("inception_next_atto"),
    _timm("hgnetv2_b0"),
    _timm("xception41"),
    _timm("xcit_nano_12_p16_224", img_size=64, depth=4),
    _timm("levit_128s", img_size=64),
    _timm("crossvit_9_240", 240),
    _timm("tnt_s_patch16_224", img_size=64, depth=4),
    _timm("coat_tiny", img_size=64),
    _timm("efficientformer_l1", 224),
    _timm("tiny_vit_5m_224", 224),
    _timm("twins_svt_small", depths=(1, 1, 2, 1)),
    _timm("nest_tiny", img_size=64),
    _timm("focalnet_tiny_srf"),
    _timm("davit_tiny", depths=(1, 1, 1, 1)),
    _timm("maxxvit_rmlp_nano_rw_256", img_size=64),
    _timm("swin_tiny_patch4_window7_224", img_size=64, window_size=4, depths=(1, 1, 2, 1)),
    _timm("swinv2_tiny_window8_256", img_size=64, window_size=4, depths=(1, 1, 2, 1)),
    _timm("hiera_tiny_224", img_size=64),
    _timm("volo_d1_224", img_size=64),
    _timm("sequencer2d_s", layers=(1, 1, 1, 1), img_size=64),
    _timm("hrnet_w18_small", task="detection"),
)


# -- transformers


def _small(**options: Any) -> dict[str, Any]:
    return {
        "vocab_size": 200, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 128, "max_position_embeddings": 64, **options,
    }  # fmt: skip


def _transformer(kind: str, wrap: Callable[[nn.Module], nn.Module], options: dict[str, Any]) -> nn.Module:
    import transformers

    stem = kind.removesuffix("EncoderModel").removesuffix("Model")
    config = getattr(transformers, f"{stem}Config")(**options)
    model = getattr(transformers, kind)(config)
    return wrap(_trained(model, ()) if not _has_batch_norm(model) else model.eval())


def _has_batch_norm(model: nn.Module) -> bool:
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())


def _text(kind: str, task: str = "text encoder", ids_only: bool = False, **options: Any) -> Architecture:
    fixed = {"use_cache": False} if task == "text decoder" else {}
    wrap = partial(Ids if ids_only else Text, **fixed)
    inputs = TOKENS[:1] if ids_only else TOKENS
    bounds = (("input_ids", 3, 200), ("attention_mask", 1, 2))[: len(inputs)]
    build = partial(_transformer, kind, wrap, _small(**options))
    return Architecture("transformers", task, kind, inputs, build, bounds)


def _vision(kind: str, task: str = "classification", size: int = 64, **options: Any) -> Architecture:
    build = partial(_transformer, kind, Values, options)
    return Architecture("transformers", task, kind, (f"image:3x{size}x{size}",), build)


def _audio(kind: str, **options: Any) -> Architecture:
    common = {
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128,
        "conv_dim": (32, 32, 32), "conv_stride": (5, 2, 2), "conv_kernel": (10, 3, 3),
        "num_feat_extract_layers": 3, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4,
    }  # fmt: skip
    build = partial(_transformer, kind, partial(Values, argument="input_values"), {**common, **options})
    return Architecture("transformers", "audio", kind, ("image:1600",), build)


_VIT = {
    "image_size": 64, "patch_size": 16, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 128,
}  # fmt: skip


def _clip_text() -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    return Text(_trained(CLIPTextModel(CLIPTextConfig(**_small(eos_token_id=2))), ()))


def _clip_vision() -> nn.Module:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    return Values(_trained(CLIPVisionModel(CLIPVisionConfig(**_VIT)), ()))


def _whisper() -> nn.Module:
    from transformers import WhisperConfig, WhisperModel

    options = {"d_model": 64, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 128}
    config = WhisperConfig(
        **options, decoder_layers=1, decoder_attention_heads=4, max_source_positions=32, num_mel_bins=16,
        vocab_size=200, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    return Values(_trained(WhisperModel(config).encoder, ()), "input_features")


def _bart_encoder() -> nn.Module:
    from transformers import BartConfig, BartModel

    options = {"d_model": 64, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 128}
    return Text(_trained(BartModel(BartConfig(**options, decoder_layers=1, vocab_size=200)).encoder, ()))


TRANSFORMERS = (
    _text("BertModel"),
    _text("RobertaModel"),
    _text("DistilBertModel", dim=64, n_layers=2, n_heads=4, hidden_dim=128),
    _text("AlbertModel", embedding_size=32),
    _text("ElectraModel", embedding_size=32),
    _text("MPNetModel"),
    _text("CamembertModel"),
    _text("XLMRobertaModel"),
    _text("ErnieModel"),
    _text("MobileBertModel", embedding_size=32, true_hidden_size=32, intra_bottleneck_size=32),
    _text("SqueezeBertModel", embedding_size=64),
    _text("ConvBertModel", embedding_size=64),
    _text("DebertaModel", relative_attention=True, pos_att_type=["c2p", "p2c"]),
    _text("DebertaV2Model", relative_attention=True, pos_att_type=["c2p", "p2c"]),
    _text("NystromformerModel", ids_only=True, segment_means_seq_len=16, num_landmarks=4),
    _text("FNetModel", ids_only=True),
    _text("ModernBertModel", pad_token_id=0, cls_token_id=1, sep_token_id=2, bos_token_id=1, eos_token_id=2),
    _text("T5EncoderModel", d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4),
    Architecture("transformers", "text encoder", "BartEncoder", TOKENS, _bart_encoder,
                 (("input_ids", 3, 200), ("attention_mask", 1, 2))),
    Architecture("transformers", "text encoder", "CLIPTextModel", TOKENS, _clip_text,
                 (("input_ids", 3, 200), ("attention_mask", 1, 2))),
    _text("GPT2Model", "text decoder", n_embd=64, n_layer=2, n_head=4, n_positions=64),
    _text("GPTNeoXModel", "text decoder"),
    _text("OPTModel", "text decoder", ffn_dim=128, word_embed_proj_dim=64),
    _text("LlamaModel", "text decoder"),
    _text("MistralModel", "text decoder", num_key_value_heads=2),
    _text("Qwen2Model", "text decoder", num_key_value_heads=2),
    _text("Gemma2Model", "text decoder", num_key_value_heads=2, head_dim=16),
    _text("PhiModel", "text decoder"),
    _text("BloomModel", "text decoder", n_layer=2, n_head=4),
    _text("MambaModel", "text decoder", ids_only=True, state_size=8),
    _vision("ViTModel", **_VIT),
    _vision("BeitModel", **_VIT),
    _vision("Dinov2Model", **_VIT),
    _vision("SwinModel", image_size=64, patch_size=4, embed_dim=24, depths=[2, 2], num_heads=[2, 4], window_size=4),
    _vision("ConvNextModel", hidden_sizes=[16, 32, 64, 128], depths=[1, 1, 2, 1]),
    _vision("SegformerModel", "segmentation", hidden_sizes=[16, 32, 40, 64], depths=[1, 1, 1, 1],
            decoder_hidden_size=32),
    _vision("YolosModel", "detection", **{**_VIT, "image_size": [64, 64]}, num_detection_tokens=10),
    _vision("Swin2SRModel", "super-resolution", image_size=32, embed_dim=24, depths=[2, 2], num_heads=[2, 4],
            window_size=4, upscale=2, size=32),
    Architecture("transformers", "classification", "CLIPVisionModel", IMAGE, _clip_vision),
    _audio("Wav2Vec2Model"),
    _audio("HubertModel"),
    _audio("WavLMModel"),
    _audio("Data2VecAudioModel", conv_pos_kernel_size=3),
    Architecture("transformers", "audio", "WhisperEncoder", ("image:16x64",), _whisper),
)  # fmt: skip


# -- what the packages above have none of, as it is published


class SRCNN(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Upsample(scale_factor=2, mode="bicubic", align_corners=False),
            *(nn.Conv2d(3, 64, 9, padding=4), nn.ReLU()),
            *(nn.Conv2d(64, 32, 5, padding=2), nn.ReLU()),
            nn.Conv2d(32, 3, 5, padding=2),
        )


class ESPCN(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            *(nn.Conv2d(3, 64, 5, padding=2), nn.Tanh()),
            *(nn.Conv2d(64, 32, 3, padding=1), nn.Tanh()),
            nn.Conv2d(32, 12, 3, padding=1),
            nn.PixelShuffle(2),
        )


class EDSR(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1))
            for _ in range(4)
        )
        self.tail = nn.Sequential(
            nn.Conv2d(width, 4 * width, 3, padding=1), nn.PixelShuffle(2), nn.Conv2d(width, 3, 3, padding=1)
        )

    def forward(self, image: Tensor) -> Tensor:
        image = first = self.head(image)
        for block in self.blocks:
            image = image + 0.5 * block(image)
        return self.tail(image + first)


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        widths = (16, 32, 64)
        self.down = nn.ModuleList(self._block(i, o) for i, o in zip((3, *widths), widths, strict=False))
        self.bottom = self._block(64, 128)
        self.rise = nn.ModuleList(nn.ConvTranspose2d(2 * w, w, 2, stride=2) for w in reversed(widths))
        self.up = nn.ModuleList(self._block(2 * w, w) for w in reversed(widths))
        self.head = nn.Conv2d(16, 4, 1)

    @staticmethod
    def _block(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(
            *(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()),
            *(nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()),
        )

    def forward(self, image: Tensor) -> Tensor:
        skips = []
        for block in self.down:
            image = block(image)
            skips.append(image)
            image = nn.functional.max_pool2d(image, 2)
        image = self.bottom(image)
        for rise, block, skip in zip(self.rise, self.up, reversed(skips), strict=True):
            image = block(torch.cat([skip, rise(image)], dim=1))
        return self.head(image)


class Recurrent(nn.Module):
    """A tagger: embedded sequence in, one answer a step out."""

    def __init__(self, kind: type[nn.RNNBase], both: bool = False) -> None:
        super().__init__()
        self.recurrent = kind(32, 48, num_layers=2, batch_first=True, bidirectional=both)
        self.head = nn.Linear(96 if both else 48, 16)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.recurrent(image)[0])


class CRNN(nn.Module):
    """Convolutions, then a bidirectional LSTM over the columns: text in images."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d((8, 2))),
        )
        self.recurrent = nn.LSTM(128, 48, bidirectional=True)
        self.head = nn.Linear(96, 40)

    def forward(self, image: Tensor) -> Tensor:
        columns = self.features(image).flatten(1, 2).permute(2, 0, 1)
        return self.head(self.recurrent(columns)[0]).transpose(0, 1)


class M5(nn.Sequential):
    """Raw audio, one-dimensional convolutions."""

    def __init__(self) -> None:
        blocks: list[nn.Module] = []
        for inputs, outputs, kernel, stride in ((1, 32, 80, 16), (32, 32, 3, 1), (32, 64, 3, 1), (64, 64, 3, 1)):
            blocks += [nn.Conv1d(inputs, outputs, kernel, stride), nn.BatchNorm1d(outputs), nn.ReLU()]
            blocks += [nn.MaxPool1d(2)]
        super().__init__(*blocks, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(64, 35))


class TCN(nn.Sequential):
    """Dilated causal convolutions over a sequence."""

    def __init__(self) -> None:
        blocks: list[nn.Module] = []
        for index, inputs in enumerate((16, 32, 32)):
            blocks += [nn.ConstantPad1d((2 * 2**index, 0), 0.0), nn.Conv1d(inputs, 32, 3, dilation=2**index)]
            blocks += [nn.ReLU()]
        super().__init__(*blocks, nn.Conv1d(32, 8, 1))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, activation="gelu")
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, image: Tensor) -> Tensor:
        return self.layers(image)


class PointNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.points = nn.Sequential(
            *(nn.Conv1d(3, 32, 1), nn.BatchNorm1d(32), nn.ReLU()),
            *(nn.Conv1d(32, 128, 1), nn.BatchNorm1d(128), nn.ReLU()),
        )
        self.head = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 16))

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.points(image).amax(2))


class Branched(nn.Module):
    """Python's own `if` on the values of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, image: Tensor) -> Tensor:
        if image.sum() > 0:
            return self.one(image)
        return self.other(image)


class Conditional(Branched):
    """The same as `torch.cond`."""

    def forward(self, image: Tensor) -> Tensor:
        return torch.cond(image.sum() > 0, lambda x: self.one(x), lambda x: self.other(x), (image,))


class Looped(nn.Module):
    """As many steps as the data asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.step = nn.Linear(32, 32)

    def forward(self, image: Tensor) -> Tensor:
        steps = 0
        while image.abs().mean() > 0.1 and steps < 10:
            image = torch.tanh(self.step(image)) * 0.5
            steps += 1
        return image


class Selected(nn.Module):
    """As many rows out as the data asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.score = nn.Linear(32, 32), nn.Linear(32, 1)

    def forward(self, image: Tensor) -> Tensor:
        rows = torch.tanh(self.layer(image.reshape(-1, 32)))
        return rows[torch.nonzero(self.score(rows)[:, 0] > 0)[:, 0]]


def _own(task: str, build: Callable[[], nn.Module], name: str, shape: str, refused: str = "") -> Architecture:
    inputs = (f"image:{shape}",)

    def make() -> nn.Module:
        return _trained(build(), inputs)

    return Architecture("own", task, name, inputs, make, refused=refused)


OWN = (
    _own("super-resolution", SRCNN, "SRCNN", "3x24x24"),
    _own("super-resolution", ESPCN, "ESPCN", "3x24x24"),
    _own("super-resolution", EDSR, "EDSR", "3x24x24"),
    _own("segmentation", UNet, "U-Net", "3x32x32"),
    _own("recurrent", partial(Recurrent, nn.RNN), "RNN", "12x32"),
    _own("recurrent", partial(Recurrent, nn.LSTM), "LSTM", "12x32"),
    _own("recurrent", partial(Recurrent, nn.LSTM, True), "bidirectional LSTM", "12x32"),
    _own("recurrent", partial(Recurrent, nn.GRU), "GRU", "12x32"),
    _own("recurrent", partial(Recurrent, nn.GRU, True), "bidirectional GRU", "12x32"),
    _own("recurrent", CRNN, "CRNN", "1x32x64"),
    _own("audio", M5, "M5", "1x8000"),
    _own("audio", TCN, "TCN", "16x64"),
    _own("text encoder", Encoder, "nn.TransformerEncoder", "12x64"),
    _own("point cloud", PointNet, "PointNet", "3x256"),
    _own("control flow", Conditional, "torch.cond", "32", "torch.cond"),
    _own("control flow", Branched, "if on a tensor", "32", "data-dependent"),
    _own("control flow", Looped, "while on a tensor", "32", "data-dependent"),
    _own("control flow", Selected, "torch.nonzero", "8x32", "data-dependent"),
)

ARCHITECTURES: dict[str, Architecture] = {a.key: a for a in (*TORCHVISION, *TIMM, *TRANSFORMERS, *OWN)}


def __getattr__(name: str) -> Callable[[], nn.Module]:
    """The factory of the architecture whose key is `name`."""
    if name not in ARCHITECTURES:
        raise AttributeError(f"no architecture {name}")
    return ARCHITECTURES[name].build
