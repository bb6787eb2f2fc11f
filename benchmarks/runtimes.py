"""Load and run pruned and dense artifacts in other runtimes, and write docs/runtimes.md.

    python benchmarks/runtimes.py [--envs DIR] [--only NAME,NAME] [--files NAME,NAME] [--write]

Every runtime has an environment of its own with pinned packages, made in --envs on first use
(Python's below the environment that runs this, where a row says so: torch and transformers are
then its). The scripts that run there stand in `runtime_envs/` and know nothing of spacompiler.
Each artifact is a pair: the dense model, which is the control, and the pruned one, exported alike.
Right means: at two sizes of inputs, within 1e-3 of torch (quantised ones: within what the dense one
loses), or 32 of 32 greedy tokens. What fails for the dense model too is the runtime's.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "runtimes.md"
TOKENS = 32
CLOSE = 1e-3


class Runtime(NamedTuple):
    """A row: the script and what it is called there, packages, and whether ours lie below them."""

    script: str
    called: str
    pins: tuple[str, ...]
    env: str
    below: bool = False
    loose: bool = False


FILES, SIDE, NODE, WEB = "inside.py", "torch_side.py", "node.mjs", "web.mjs"
TEXT = "runners.py"
_TOOLS = ("onnxslim==0.1.98", "onnxsim==0.8.1", "onnx2torch==1.5.15", "torchvision==0.28.0",
          "pillow", "colorama==0.4.6")
_JS = ("@huggingface/transformers@4.3.2", "onnxruntime-node@1.30.0", "onnxruntime-web@1.30.0",
       "puppeteer-core@25.16.0")
RUNTIMES = {
    "ONNX Runtime": Runtime(FILES, "onnxruntime", (), "own", True),
    "onnx's reference": Runtime(FILES, "reference", (), "own", True),
    "ORT static QDQ": Runtime(FILES, "qdq", (), "own", True, loose=True),
    "onnxslim": Runtime(FILES, "onnxslim", _TOOLS, "onnxtools", True),
    "onnxsim": Runtime(FILES, "onnxsim", _TOOLS, "onnxtools", True),
    "onnx2torch": Runtime(FILES, "onnx2torch", _TOOLS, "onnxtools", True),
    "OpenVINO": Runtime(FILES, "openvino", ("openvino==2026.4.1",), "openvino", True),
    "NNCF int8 (OpenVINO)": Runtime(
        FILES, "nncf", ("nncf==3.4.0", "openvino==2026.4.1", "openvino-telemetry", "tabulate",
                        "scikit-learn", "scipy", "joblib", "threadpoolctl"), "nncf", True,
        loose=True),
    "MNN": Runtime(FILES, "mnn", ("MNN==3.6.1",), "mnn", True),
    "IREE": Runtime(FILES, "iree", ("iree-base-compiler[onnx]==3.13.0",
                                    "iree-base-runtime==3.13.0", "numpy"), "iree"),
    "TVM": Runtime(FILES, "tvm", ("apache-tvm==0.27.0.post1", "onnx", "numpy"), "tvm"),
    "tinygrad": Runtime(FILES, "tinygrad", ("tinygrad==0.14.0", "numpy"), "tinygrad"),
    "OpenCV": Runtime(FILES, "opencv", ("opencv-python-headless==5.0.0.93",), "opencv", True),
    "tract": Runtime(FILES, "tract", ("tract==0.23.9",), "tract", True),
    "ncnn (pnnx)": Runtime(FILES, "ncnn", ("ncnn==1.0.20261020", "pnnx==20261020"), "ncnn", True,
                           loose=True),
    "onnxruntime-node": Runtime(NODE, "onnxruntime-node", _JS, "node"),
    "onnxruntime-web": Runtime(NODE, "onnxruntime-web", _JS, "node"),
    "onnxruntime-web in headless Chromium": Runtime(WEB, "onnxruntime-web", _JS, "node"),
    "transformers.js in Node": Runtime(NODE, "transformers.js", _JS, "node"),
    "transformers.js in headless Chromium": Runtime(WEB, "transformers.js", _JS, "node"),
    "transformers, generate": Runtime(SIDE, "eager", (), "own", True),
    "transformers, Trainer": Runtime(SIDE, "trainer", (), "own", True),
    "torch.export": Runtime(SIDE, "exported", (), "own", True),
    "ExecuTorch": Runtime(SIDE, "executorch", ("executorch==1.5.1", "pandas", "ruamel.yaml",
                                            "tabulate"), "executorch", True),
    "Core ML (conversion)": Runtime(SIDE, "coreml", ("coremltools==9.0", "cattrs", "attrs",
                                                     "pyaml"), "coreml", True),
    "torchao int8": Runtime(SIDE, "torchao_int8", ("torchao==0.18.0",), "torchao", True),
    "torchao int4, groups of 32": Runtime(SIDE, "torchao_int4", ("torchao==0.18.0",), "torchao",
                                          True),
    "optimum-quanto int8": Runtime(SIDE, "quanto", ("optimum-quanto==0.2.7", "ninja"), "quanto",
                                   True),
    "onnxruntime-genai": Runtime(TEXT, "genai", (), "own", True),
    "llama.cpp": Runtime(TEXT, "llama.cpp", ("cyllama==0.2.18", "numpy"), "cyllama"),
    "CTranslate2": Runtime(TEXT, "ctranslate2", ("ctranslate2==4.8.5",), "ct2", True),
}
FILE_ARTIFACTS = ("resnet", "vit", "bert", "efficientnet", "t5", "llama", "llama with a cache")
TEXT_ARTIFACT = "llama as text"
KEPT = {"ctranslate2": "channels"}
"""What runs the one whose heads stay, as the profile for it has it."""
TIMED = ("bert", "efficientnet")
"""Those that are wide enough for their times to say something."""


def main() -> int:
    """Make the artifacts, run every row, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--envs", type=Path, default=Path(tempfile.gettempdir()) / "runtime-envs")
    parser.add_argument("--only", default="")
    parser.add_argument("--files", default="", help="of the row: what it said of others stays")
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    given.envs.mkdir(exist_ok=True)
    place = given.envs / "artifacts"
    make(place)
    found = place / "found.json"
    table = json.loads(found.read_text()) if found.exists() else {}
    for name, runtime in RUNTIMES.items():
        if not given.only or name in given.only.split(","):
            table[name] = {**table.get(name, {}), **run(runtime, given.envs, place, given.files)}
            found.write_text(json.dumps(table, indent=1))
            print(name, json.dumps(table[name]), flush=True)
    if given.write:
        PAGE.write_text(page(table, json.loads((place / "jobs.json").read_text())["sizes"]))
    return 0


def environment(runtime: Runtime, envs: Path) -> list[str]:
    """The command that runs a script in a runtime's environment, made if it is not there."""
    place = envs / runtime.env
    if runtime.env == "own":
        return [sys.executable]
    if runtime.env == "node":
        if not (place / "node_modules").exists():
            place.mkdir(exist_ok=True)
            (place / "package.json").write_text("{}")
            # packages bring their binaries along; a script of theirs wants to fetch others
            subprocess.run(["npm", "install", "--ignore-scripts", *runtime.pins], cwd=place,
                           check=True, capture_output=True)
        return ["node"]
    if not place.exists():
        subprocess.run([sys.executable, "-m", "venv", place], check=True)
        pip = [place / "bin" / "python", "-m", "pip", "install", "-q", "--no-compile"]
        subprocess.run([*pip, *(["--no-deps"] if runtime.below else []), *runtime.pins], check=True)
        if runtime.below:
            inner = next((place / "lib").glob("python*/site-packages"))
            ours = next(p for p in sys.path if p.endswith("site-packages"))
            (inner / "zz.pth").write_text(ours + "\n")
    return [str(place / "bin" / "python")]


def run(runtime: Runtime, envs: Path, place: Path, only: str) -> dict[str, dict[str, object]]:
    """What a runtime said of each artifact, or of some."""
    command = environment(runtime, envs)
    if runtime.script == TEXT:
        return {TEXT_ARTIFACT: dict(_texts(runtime, command, place))}
    jobs = json.loads((place / "jobs.json").read_text())["files"]
    whole = runtime.script == SIDE or runtime.called == "transformers.js"
    job = place / "job.json"
    found: dict[str, dict[str, object]] = {}
    for name, folder in jobs.items():
        if (name == TEXT_ARTIFACT) != whole or (only and name not in only.split(",")):
            continue
        job.write_text(json.dumps({name: folder}))
        try:
            done = subprocess.run(
                [*command, str(HERE / "runtime_envs" / runtime.script), runtime.called, str(job)],
                capture_output=True, text=True, timeout=600,
                cwd=envs / "node" if runtime.env == "node" else None)
            rows = [json.loads(x[4:]) for x in done.stdout.splitlines() if x.startswith("ROW ")]
            last = (done.stderr.strip().splitlines() or [""])[-1][-160:]
            found[name] = rows[0] if rows else {"died": f"ended with {done.returncode}: {last}"}
        except subprocess.TimeoutExpired:
            found[name] = {"died": "took more than 600 s"}
    return found


def _texts(runtime: Runtime, command: list[str], place: Path) -> Iterator[tuple[str, object]]:
    """Greedy tokens, each after torch's before it."""
    script = HERE.parent / "spacompiler" / "deploy" / TEXT
    for which in ("dense", "pruned"):
        kind = KEPT.get(runtime.called, which) if which == "pruned" else which
        folder = place / TEXT_ARTIFACT / f"{kind}_hf"
        text = json.loads((folder.parent / f"{kind}_text.json").read_text())
        ids, tokens = text["ids"], text["tokens"]
        done = subprocess.run([*command, str(script), runtime.called, str(folder)], text=True,
                              input=json.dumps([ids + tokens[:i] for i in range(len(tokens))]),
                              capture_output=True, timeout=600)
        last = (done.stdout.strip().splitlines() or [""])[-1]
        if done.returncode or not last.startswith("["):
            yield which, (done.stderr.strip().splitlines() or ["it said nothing"])[-1][-160:]
        else:
            same = sum(a == b for a, b in zip(json.loads(last), tokens, strict=True))
            yield which, {"same": same, "tokens": len(tokens)}


# --- the artifacts ----------------------------------------------------------------------------


def make(place: Path) -> None:
    """Compile each model that is not there, export the dense one alike, and store inputs and
    torch's results."""
    file = place / "jobs.json"
    made = json.loads(file.read_text()) if file.exists() else {"files": {}, "sizes": {}}
    for name, model, target, options in (
            ("resnet", "zoo:resnet", "params=60%", {}), ("vit", "zoo:vit", "body=75%", {}),
            ("bert", "wide", "body=75%", {}), ("t5", "zoo:t5", "body=75%", {}),
            ("efficientnet", "zoo:efficientnet-lite0", "macs=75%", {}),
            ("llama", "zoo:llama-gqa", "body=60%", {}),
            ("llama with a cache", "zoo:llama-gqa", "body=60%", {"decoder": True})):
        if name not in made["files"]:
            _made(place / name, model, target, options)
            made["files"][name], made["sizes"][name] = str(place / name), target
            file.write_text(json.dumps(made))
    if TEXT_ARTIFACT not in made["files"]:
        _text(place / TEXT_ARTIFACT)
        made["files"][TEXT_ARTIFACT] = str(place / TEXT_ARTIFACT)
        file.write_text(json.dumps(made))


def _made(folder: Path, model: str, target: str, options: dict[str, bool]) -> None:
    import spacompiler

    folder.mkdir(parents=True, exist_ok=True)
    module, inputs = _wide_bert() if model == "wide" else (model, None)
    result = spacompiler.compile(module, inputs, target=target, importance="magnitude",
                                 latency=False, out=folder / "made", name=folder.name, **options)
    _pair(result, folder, cached="decoder" in options)
    print("made", folder.name, flush=True)


def _wide_bert():
    """Two layers as wide as those of BERT's base model."""
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    model = BertModel(BertConfig(vocab_size=128, hidden_size=768, num_hidden_layers=2,
                                 num_attention_heads=12, intermediate_size=3072,
                                 max_position_embeddings=128), add_pooling_layer=False).eval()
    ids = torch.randint(128, (2, 64))
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _pair(result, folder: Path, cached: bool) -> None:
    """Write both files, sets of inputs, and torch's results (with a cache: ONNX Runtime's)."""
    from spacompiler.deploy.cases import Sizes, synthetic
    from spacompiler.deploy.decoder import export_decoder
    from spacompiler.deploy.export import export_onnx
    from spacompiler.deploy.inputs import axis_names, feed, other_inputs
    from spacompiler.runtime.session import open_session, run_session
    from spacompiler.torch_backend.weights import results

    job = result.job
    shutil.copy(folder / "made" / "model.onnx", folder / "pruned.onnx")
    if cached:
        export_decoder(job.reference, folder / "dense.onnx")
    else:
        export_onnx(job.trace.exported, folder / "dense.onnx", axes=axis_names(job.trace),
                    input_names=job.trace.graph.inputs)
    for which in ("dense", "pruned"):
        path = folder / f"{which}.onnx"
        sets = [synthetic(path, Sizes(1, 5)), synthetic(path, Sizes(2, 1, 7))] if cached else [
            feed(job.trace, *other_inputs(job.trace, k)) for k in (0, 1)]
        outs = [dict(enumerate(run_session(open_session(path), s))) for s in sets] if cached else [
            dict(enumerate(r.numpy() for r in results(
                job.reference if which == "dense" else job.pruned, *other_inputs(job.trace, k))))
            for k in (0, 1)]
        prefix = "inputs" if not cached else f"{which}_inputs"
        _store(folder / prefix, sets)
        _store(folder / f"{which}_outputs", outs)


def _store(path: Path, sets: list[dict[str | int, np.ndarray]]) -> None:
    np.savez(path, **{f"{i}|{name}": a for i, one in enumerate(sets) for name, a in one.items()})
    path.with_suffix(".json").write_text(json.dumps([
        {name: {"type": str(a.dtype), "shape": list(a.shape), "data": a.ravel().tolist()}
         for name, a in one.items()} for one in sets]))


def _text(folder: Path) -> None:
    """Directories of a small Llama in the layouts that text runtimes load."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import spacompiler
    from spacompiler.deploy.decoder import export_decoder
    from spacompiler.deploy.genai import genai_config
    from spacompiler.deploy.gguf_file import write_gguf
    from spacompiler.store.folder import write_json

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=384, num_hidden_layers=4,
        num_attention_heads=8, num_key_value_heads=4, head_dim=16, bos_token_id=1,
        eos_token_id=2, max_position_embeddings=256, initializer_range=0.12)).eval()
    ids = torch.randint(3, 256, (2, 16))
    made = {which: spacompiler.compile(
        model, {"input_ids": ids}, target=target, align=32, importance="magnitude",
        layout="uniform", onnx=False, latency=False, roles=roles).module
        for which, target, roles in (("pruned", "body=60%", ["channel", "head"]),
                                     ("channels", "body~60%", ["channel"]))}
    for which, module in (("dense", model), *made.items()):
        for place in (folder / f"{which}_hf", folder / f"{which}_js"):
            module.save_pretrained(place)
            _words(place, 256)
        _number_type(folder / f"{which}_js" / "config.json")
        export_decoder(module, folder / f"{which}_hf" / "model.onnx")
        write_json(folder / f"{which}_hf" / "genai_config.json",
                   genai_config(module, folder / f"{which}_hf" / "model.onnx"))
        write_gguf(module, folder / f"{which}_hf" / "model.gguf")
        (folder / f"{which}_js" / "onnx").mkdir()
        shutil.copy(folder / f"{which}_hf" / "model.onnx", folder / f"{which}_js" / "onnx")
        start = ids[:1, :8]
        written = module.generate(input_ids=start, attention_mask=torch.ones_like(start),
                                  max_new_tokens=TOKENS, do_sample=False, eos_token_id=None,
                                  pad_token_id=0)[0, 8:]
        (folder / f"{which}_text.json").write_text(json.dumps(
            {"ids": start[0].tolist(), "tokens": written.tolist()}))


def _number_type(config: Path) -> None:
    """Say which file transformers.js is to take, as `--for transformers.js` does."""
    said = json.loads(config.read_text())
    config.write_text(json.dumps({**said, "transformers.js_config": {"dtype": "fp32"}}, indent=2))


def _words(place: Path, count: int) -> None:
    """A tokenizer of numbered words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(count)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="w1", eos_token="w2",
                            unk_token="w0").save_pretrained(place)


# --- the page ---------------------------------------------------------------------------------


Found = dict[str, dict[str, object]]
"""What a runtime said of each artifact."""


def cell(said: dict[str, object], loose: bool) -> str:
    """What came of one artifact, in a few words."""
    if "died" in said:
        return f"fails: {said['died']}"
    dense, pruned = said["dense"], said["pruned"]
    if isinstance(pruned, str):
        return "fails, and so does the dense one" if isinstance(dense, str) else f"**{pruned}**"
    if isinstance(pruned, dict):
        return str(pruned["said"]) if "said" in pruned else \
            f"{pruned['same']} of {pruned['tokens']}"
    worst = max(pruned)
    bound = 2 * max(dense) + CLOSE if loose and isinstance(dense, list) else CLOSE
    useless = 0.5 if loose else CLOSE
    if isinstance(dense, list) and min(worst, max(dense)) > useless:
        return f"wrong ({worst:.0e}), and so is the dense one"
    speed = f", {said['ratio']:.2f}" if "ratio" in said and said["artifact"] in TIMED else ""
    return f"{worst:.0e}{speed}" if worst <= bound else f"**wrong: {worst:.0e}**"


def _middle(table: dict[str, Found]) -> str:
    found = {n: [rows[n]["ratio"] for rows in table.values() if "ratio" in rows.get(n, {})]
             for n in TIMED}
    return " and ".join(f"{np.median(ratios):.2f} in the middle of {len(ratios)} runtimes ({n})"
                        for n, ratios in found.items() if ratios)


def page(table: dict[str, Found], sizes: dict[str, str]) -> str:
    """The page of results."""
    shown = [n for n in FILE_ARTIFACTS if any(n in found for found in table.values())]
    head = ["runtime", *(f"{n} ({sizes[n]})" for n in shown)]
    left = ", ".join(n for n in RUNTIMES if n not in table)
    rows, texts = [], []
    for name, found in table.items():
        pins = next((p for p in RUNTIMES[name].pins if RUNTIMES[name].called in p),
                    " ".join(RUNTIMES[name].pins[:1]))
        label = f"{name}{f' ({pins})' if pins else ''}"
        if TEXT_ARTIFACT in found:
            said = found[TEXT_ARTIFACT]
            texts.append(f"| {label} | {cell({**said, 'pruned': said.get('dense')}, False)} "
                         f"| {cell(said, False)} |" if "died" not in said else
                         f"| {label} | | {cell(said, False)} |")
        else:
            rows.append(f"| {label} | " + " | ".join(
                cell(found[n], RUNTIMES[name].loose) if n in found else ""
                for n in shown) + " |")
    return "\n".join([
        "# What runs what is written", "",
        "Written by `python benchmarks/runtimes.py --write`, from rows that were run one at a time",
        "(`--only`): every runtime in an environment of its own. The dense model, exported alike,",
        "is the control: what fails for it too is the runtime's.", "", "## ONNX files", "",
        "The largest difference to torch over the largest result, at two sizes; for bert (two",
        "layers of BERT's base width) and efficientnet (Lite0 as trained, 224 by 224), which are",
        "wide enough for that, also CPU time pruned : dense, in turn on one machine:",
        f"{_middle(table)}.", "",
        "| " + " | ".join(head) + " |", "|" + "---|" * len(head), *rows, "",
        *(["## Language models as directories", "",
           f"Greedy tokens of {TOKENS} that are torch's, or the relative difference of logits (of",
           "quantised ones: to the unquantised). CTranslate2 runs the one whose heads stay, as",
           "`--for ctranslate2` has it.", "",
           "| runtime | dense | pruned |", "|---|---|---|", *texts, ""] if texts else []),
        *([f"Not run for this page: {left}.", ""] if left else [])])


if __name__ == "__main__":
    sys.exit(main())
