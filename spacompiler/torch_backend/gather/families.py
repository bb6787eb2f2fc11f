"""What kind of head a network has, by the families in which transformers lists its class."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ..kinds import is_hf

# family of transformers' auto classes -> kind of its `logits`; the first that lists a class counts
FAMILIES: Mapping[str, str] = {
    **dict.fromkeys(("SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "CAUSAL_LM", "IMAGE_TEXT_TO_TEXT",
                     "MULTIMODAL_LM", "CAUSAL_IMAGE_MODELING"), "next"),
    "MASKED_LM": "masked",
    **dict.fromkeys(("SEQUENCE_CLASSIFICATION", "TOKEN_CLASSIFICATION", "MULTIPLE_CHOICE",
                     "NEXT_SENTENCE_PREDICTION", "IMAGE_CLASSIFICATION", "VIDEO_CLASSIFICATION",
                     "AUDIO_CLASSIFICATION", "AUDIO_FRAME_CLASSIFICATION", "AUDIO_XVECTOR",
                     "VISUAL_QUESTION_ANSWERING", "SEMANTIC_SEGMENTATION", "OBJECT_DETECTION",
                     "TEXT_RECOGNITION", "TIME_SERIES_CLASSIFICATION"), "classes"),
    "CTC": "frames",
    **dict.fromkeys(("TABLE_QUESTION_ANSWERING", "PRETRAINING", "MASKED_IMAGE_MODELING"), "values"),
}


def family(module: nn.Module) -> str:
    """Return the kind of head by which transformers lists a network's class, or ""."""
    if not is_hf(module):
        return ""
    from transformers.models.auto import modeling_auto

    for cls in type(module).__mro__:
        for name, kind in FAMILIES.items():
            known = getattr(modeling_auto, f"MODEL_FOR_{name}_MAPPING_NAMES", {})
            if any(cls.__name__ in (v if isinstance(v, (list, tuple)) else (v,))
                   for v in known.values()):
                return kind
    return ""
