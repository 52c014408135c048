"""What ONNX Runtime reads of an ONNX file, as far as that is known without importing it."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import onnx

Operator = tuple[str, str, int]
"""Domain (ai.onnx is the empty one), name, and version of the domain."""

_READS: Mapping[tuple[int, int], tuple[int, int]] = {(1, 22): (10, 22), (1, 23): (11, 23), (1, 32): (14, 28)}
"""By release, from the oldest that gpuopt takes: newest IR version and opset of ai.onnx; later ones read as much."""
_NEWEST_OPSETS: Mapping[str, int] = {"ai.onnx.ml": 5, "com.microsoft": 1}
"""Of all these releases."""

_MICROSOFT = """
    Attention AttnLSTM BeamSearch BiasAdd BiasDropout BiasGelu BiasSoftmax BiasSplitGelu BifurcationDetector
    BitmaskBiasDropout BitmaskDropout CDist ComplexMul ComplexMulConj ConvTransposeWithDynamicPads CropAndResize
    DecoderAttention DecoderMaskedMultiHeadAttention DecoderMaskedSelfAttention DequantizeBFP DequantizeLinear
    DequantizeWithOrder DynamicQuantizeLSTM DynamicQuantizeMatMul DynamicTimeWarping EPContext
    EmbedLayerNormalization ExpandDims FastGelu FusedConv FusedGemm FusedMatMul FusedMatMulActivation
    GatedRelativePositionBias GatherBlockQuantized GatherND Gelu GemmFastGelu GemmFloat8 GemmaRotaryEmbedding
    GreedySearch GridSample GroupNorm GroupQueryAttention Inverse Irfft IsAllFinite LongformerAttention
    MatMulBnb4 MatMulFpQ4 MatMulInteger16 MatMulIntegerToFloat MatMulNBits MaxpoolWithMask MoE MulInteger
    MultiHeadAttention MurmurHash3 NGramRepeatBlock NhwcConv NhwcFusedConv NhwcMaxPool PackedAttention
    PackedMultiHeadAttention Pad QAttention QEmbedLayerNormalization QGemm QLinearAdd QLinearAveragePool
    QLinearConcat QLinearConv QLinearGlobalAveragePool QLinearLeakyRelu QLinearMul QLinearReduceMean
    QLinearSigmoid QLinearSoftmax QLinearWhere QMoE QOrderedAttention QOrderedGelu QOrderedLayerNormalization
    QOrderedLongformerAttention QOrderedMatMul QuantizeBFP QuantizeLinear QuantizeWithOrder QuickGelu Range
    ReduceSumInteger RelativePositionBias RemovePadding RestorePadding Rfft RotaryEmbedding SampleOp Sampling
    SkipGroupNorm SkipLayerNormalization SkipSimplifiedLayerNormalization Snpe SparseAttention
    SparseToDenseMatMul Tokenizer TorchEmbedding TransposeMatMul Trilu UnfoldTensor Unique WhisperBeamSearch
    WordConvEmbedding
"""
"""The operators of com.microsoft in 1.22; later releases have them and more."""
# In the domain of ONNX without being ONNX's: the first for every opset, the others for old ones or TensorRT's provider.
_BESIDE_ONNX = "LayerNormalization SimplifiedLayerNormalization"
_BESIDE_ONNX_AT_TIMES = """
    Affine Crop DisentangledAttention_TRT DynamicSlice EfficientNMS_TRT GRUUnit GivenTensorFill GroupNormalization
    ImageScaler MeanVarianceNormalization MemcpyFromHost MemcpyToHost MultilevelCropAndResize_TRT ParametricSoftplus
    PyramidROIAlign_TRT Scale ScaledTanh ThresholdedRelu
"""
_MOST_NAMES = 5


@dataclass(frozen=True)
class Objections:
    """What speaks against a file, and what leaves it open, a line each."""

    reasons: tuple[str, ...]
    open_questions: tuple[str, ...]


def objections(release: str, ir_version: int, opsets: Mapping[str, int], operators: Collection[Operator]) -> Objections:
    """What an ONNX Runtime lacks of what a file needs.

    Args:
        release: its version; empty: not known.
        opsets: of the file, by domain.
        operators: all that the file does not define itself.
    """
    stated = re.match(r"(\d{1,6})\.(\d{1,6})", release)
    here = (int(stated[1]), int(stated[2])) if stated else min(_READS)
    newest_ir, newest_opset = _READS[max((one for one in _READS if one <= here), default=min(_READS))]
    # What newer opsets define is not known to this onnx package.
    newest = {**_NEWEST_OPSETS, "": min(newest_opset, onnx.defs.onnx_opset_version())}
    too_new = {domain for domain, version in opsets.items() if version > newest.get(domain, version)}
    known = f"that ONNX Runtime {release}".rstrip() + " is known to read"
    questions = [f"IR version {ir_version} is newer than {newest_ir}, the newest {known}"] * (ir_version > newest_ir)
    questions += [
        f"opset {opsets[domain]} of {domain or 'ai.onnx'} is newer than {newest[domain]}, the newest {known}"
        for domain in sorted(too_new)
    ]
    looked_at = sorted(one for one in operators if one[0] in newest and one[0] not in too_new)
    unknown = [one for one in looked_at if _may_be_there(one)]
    missing = [one for one in looked_at if not _is_there(one) and one not in unknown]
    reasons = [f"ONNX has no {_listed(missing)}"] if missing else []
    if unknown:
        questions.append(f"whether ONNX Runtime has {_listed(unknown)} is not known unless it is loaded")
    if foreign := sorted({domain for domain, _, _ in operators} - set(newest)):
        questions.append(f"its operators of {', '.join(foreign)} need a library that defines them")
    return Objections(tuple(reasons), tuple(questions))


def _is_there(operator: Operator) -> bool:
    domain, name, version = operator
    if domain == "com.microsoft":
        return name in _MICROSOFT.split()
    if not domain and name in _BESIDE_ONNX.split():
        return True
    try:
        return not onnx.defs.get_schema(name, version, domain).deprecated
    except onnx.defs.SchemaError:
        return False


def _may_be_there(operator: Operator) -> bool:
    domain, name, _ = operator
    return not _is_there(operator) and (
        domain == "com.microsoft" or (not domain and name in _BESIDE_ONNX_AT_TIMES.split())
    )


def _listed(operators: Collection[Operator]) -> str:
    shown = [f"{domain or 'ai.onnx'}.{name} (opset {version})" for domain, name, version in operators]
    more = f" and {len(shown) - _MOST_NAMES} more" if len(shown) > _MOST_NAMES else ""
    return f"operator {', '.join(shown[:_MOST_NAMES])}{more}"
