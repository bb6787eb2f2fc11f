"""Which loss each head of transformers is scored by: tiny models, compiled with default options.

    python benchmarks/heads.py --only '*Classification*'

Caches are on, as a configuration has them; scores are by gradients. A row says whether the artifact
was written, in which form, and by which loss; the last column is the loss that is right.
"""

from __future__ import annotations

import argparse
import fnmatch
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import tiny_transformers as tiny
import torch
from tiny_transformers import Config, Family, both, pair, picture, spectrum, speech, text, wave

import spacompiler
from spacompiler.errors import SpaError

NEXT, CLASS, OWN = "next-token cross-entropy", "class cross-entropy", "projection"
TEXT: Config = {**tiny.TEXT, "num_labels": 2}
SEQ2SEQ, T5, SSM = ({k: v for k, v in rows.items() if k != "use_cache"}
                    for rows in (tiny.SEQ2SEQ, tiny.T5, tiny.SSM))
MEL: Config = {**SEQ2SEQ, "num_mel_bins": 16, "max_source_positions": 12,
               "max_target_positions": 16}
DPT: Config = {"num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3], "is_hybrid": False,
               "neck_hidden_sizes": [16, 20, 24, 28], "fusion_hidden_size": 16}
STAGES: Config = {"hidden_sizes": [16, 24, 32, 48], "num_attention_heads": [1, 2, 4, 6],
                  "depths": [1, 1, 1, 1], "mlp_ratios": [2, 2, 2, 2], "decoder_hidden_size": 24}
RESNET: Config = {"embedding_size": 20, "hidden_sizes": [24, 32, 40, 48], "depths": [1, 1, 2, 1]}
DETR: Config = {"num_queries": 5, "use_timm_backbone": False, "use_pretrained_backbone": False,
                "backbone": None, "backbone_config": {"model_type": "resnet", **RESNET,
                                                      "out_features": ["stage4"]}}


class Row(NamedTuple):
    """A head: auto class, type, defaults of its configuration, inputs, the right loss, own rows."""

    cls: str
    kind: str
    defaults: Config
    inputs: Callable[[], Any]
    loss: str
    own: Config | None = None


def choices() -> Any:
    """Two questions of three choices each."""
    return {"input_ids": torch.randint(3, tiny.VOCABULARY, (2, 3, 9))}


def page() -> Any:
    """Tokens with the boxes that they stand in."""
    return {**text(), "bbox": torch.randint(0, 30, (2, 9, 4)).sort(-1).values}


def cells() -> Any:
    """A question and a table, with what each token is."""
    return {**text(), "token_type_ids": (torch.arange(9) > 3).long().view(1, 9, 1).repeat(2, 1, 7)}


ROWS = (
    Row("AutoModel", "bert", TEXT, text, OWN),
    Row("AutoModel", "llama", TEXT, text, OWN),
    Row("AutoModel", "bart", SEQ2SEQ, pair, OWN),
    Row("AutoModel", "clip_text_model", tiny.CLIP_TEXT, text, OWN),
    Row("AutoModel", "clip_vision_model", tiny.CLIP_IMAGE, picture, OWN),
    Row("AutoModel", "vit", tiny.IMAGE, picture, OWN),
    Row("AutoModelForTextEncoding", "t5", T5, text, OWN),
    Row("AutoModelForZeroShotImageClassification", "clip", tiny.TOWERS, both, OWN),
    Row("AutoBackbone", "resnet", RESNET, picture, OWN),
    Row("AutoModelForPreTraining", "bert", TEXT, text, "token cross-entropy (prediction_logits)"),
    Row("AutoModelForPreTraining", "electra", TEXT, text, OWN),
    Row("AutoModelForCausalLM", "llama", TEXT, text, NEXT),
    Row("AutoModelForCausalLM", "gpt2", TEXT, text, NEXT),
    Row("AutoModelForCausalLM", "xglm", TEXT, text, NEXT, {"ffn_dim": 40}),
    Row("AutoModelForCausalLM", "mamba", SSM, text, NEXT),
    Row("AutoModelForMaskedLM", "bert", TEXT, text, "token cross-entropy"),
    Row("AutoModelForMaskedLM", "roberta", TEXT, text, "token cross-entropy"),
    Row("AutoModelForSeq2SeqLM", "t5", T5, pair, NEXT),
    Row("AutoModelForSeq2SeqLM", "bart", SEQ2SEQ, pair, NEXT),
    Row("AutoModelForSpeechSeq2Seq", "whisper", MEL, partial(speech, turned=True), NEXT),
    Row("AutoModelForSequenceClassification", "bert", TEXT, text, CLASS),
    Row("AutoModelForSequenceClassification", "llama", TEXT, text, CLASS),
    Row("AutoModelForSequenceClassification", "roberta", {**TEXT, "num_labels": 1}, text, CLASS),
    Row("AutoModelForTokenClassification", "bert", TEXT, text, CLASS),
    Row("AutoModelForTokenClassification", "gpt2", TEXT, text, CLASS),
    Row("AutoModelForQuestionAnswering", "bert", TEXT, text, f"{CLASS} (start_logits, end_logits)"),
    Row("AutoModelForQuestionAnswering", "llama", TEXT, text,
        f"{CLASS} (start_logits, end_logits)"),
    Row("AutoModelForDocumentQuestionAnswering", "layoutlm", TEXT, page,
        f"{CLASS} (start_logits, end_logits)"),
    Row("AutoModelForTableQuestionAnswering", "tapas", TEXT, cells, OWN),
    Row("AutoModelForVisualQuestionAnswering", "vilt",
        {**tiny.CLIP_TEXT, "image_size": 32, "patch_size": 8}, both, OWN),  # in parts
    Row("AutoModelForMultipleChoice", "bert", TEXT, choices, CLASS),
    Row("AutoModelForNextSentencePrediction", "bert", TEXT, text, CLASS),
    Row("AutoModelForImageClassification", "vit", tiny.IMAGE, picture, CLASS),
    Row("AutoModelForImageClassification", "resnet", RESNET, picture, CLASS),
    Row("AutoModelForMaskedImageModeling", "vit", {**tiny.IMAGE, "encoder_stride": 8}, picture,
        OWN),
    Row("AutoModelForSemanticSegmentation", "segformer", STAGES, picture, CLASS),
    Row("AutoModelForDepthEstimation", "dpt", {**tiny.IMAGE, **DPT}, picture, OWN),
    Row("AutoModelForObjectDetection", "yolos", {**tiny.IMAGE, "image_size": [32, 32],
                                                 "num_detection_tokens": 5}, picture, CLASS),
    Row("AutoModelForObjectDetection", "detr", {**SEQ2SEQ, **DETR}, picture, CLASS),
    Row("AutoModelForVideoClassification", "videomae", {**tiny.IMAGE, "num_frames": 4},
        tiny.video, CLASS),
    Row("AutoModelForAudioClassification", "wav2vec2", tiny.SOUND, wave, CLASS),
    Row("AutoModelForAudioClassification", "audio-spectrogram-transformer",
        {**tiny.IMAGE, "max_length": 24, "num_mel_bins": 16},
        partial(spectrum, name="input_values"), CLASS),
    Row("AutoModelForAudioFrameClassification", "wav2vec2", tiny.SOUND, wave, CLASS),
    Row("AutoModelForAudioXVector", "wav2vec2", {**tiny.SOUND, "tdnn_dim": (24, 24, 32),
                                                 "tdnn_kernel": (3, 2, 1), "tdnn_dilation": (
                                                     1, 1, 1)}, wave, CLASS),
    Row("AutoModelForCTC", "wav2vec2", tiny.SOUND, wave, "frame cross-entropy"),
)


def built(row: Row) -> tuple[torch.nn.Module, dict[str, Any]]:
    """Return the model and a user's inputs: nothing is said of caches."""
    family = Family(row.cls, row.defaults, row.inputs, {row.kind: row.own or {}})
    model, inputs = tiny.build(family, row.kind)
    inputs.pop("use_cache", None)
    return model, inputs


def tried(row: Row, target: str) -> tuple[bool, str, str]:
    """Return whether an artifact was written by the right loss, its form and its loss."""
    model, inputs = built(row)
    with tempfile.TemporaryDirectory() as folder:
        try:
            result = spacompiler.compile(model, inputs, target=target, align=1,
                                         out=Path(folder) / "out")
        except SpaError as problem:
            return False, "error", f"{problem.what}: {problem.why}"
        except Exception as problem:  # a crash is what this looks for
            return False, "crash", f"{type(problem).__name__}: {problem}"
    loss = (result.report["loss"] or {"name": "none"})["name"]
    parts = any("in parts" in note for note in result.report["notes"])
    return loss.startswith(row.loss), result.job.layout + (" in parts" if parts else ""), loss


def main() -> None:
    """Print one row a head, and how many are right."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="*", help="pattern over 'class type'")
    parser.add_argument("--target", default="body=75%")
    options = parser.parse_args()
    right, rows = 0, [r for r in ROWS if fnmatch.fnmatch(f"{r.cls} {r.kind}", options.only)]
    print("| head | type | right | layout | loss | s |\n|---|---|---|---|---|---|")
    for row in rows:
        start = time.perf_counter()
        fits, form, loss = tried(row, options.target)
        right += fits
        print(f"| {row.cls} | {row.kind} | {'yes' if fits else 'NO'} | {form} | {loss} | "
              f"{time.perf_counter() - start:.1f} |", flush=True)
    print(f"\n{right} of {len(rows)} heads compile by the loss that fits")


if __name__ == "__main__":
    main()
