"""Models in layout per-layer under other versions of transformers, without this package.

    spacompiler compile zoo:llama-gqa --target body=60% --layout per-layer --align 1 \\
        --no-latency --out /tmp/unequal
    python benchmarks/per_layer.py /tmp/unequal --versions 5.23.0 5.24.0

Each version is installed by pip into a folder of its own, without what it depends on, and each
directory is loaded there by a process in which spacompiler cannot be imported: by the file beside
the weights. Results are compared with those recorded at the compile, greedy tokens with a
cache with those without, and after one step of training the model is saved and loaded again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

CHILD = '''
import json, sys, warnings
sys.modules["spacompiler"] = None
warnings.simplefilter("ignore")
import torch, transformers
from safetensors.torch import load_file
transformers.logging.set_verbosity_error()
torch.manual_seed(0)
folder, again, tokens = sys.argv[1], sys.argv[2], int(sys.argv[3])
said = json.load(open(folder + "/config.json"))
found = {"transformers": transformers.__version__}
auto = next(a for a, n in said["auto_map"].items() if n.endswith("." + said["architectures"][0]))
auto = getattr(transformers, auto)
try:
    auto.from_pretrained(folder)
    found["without the flag"] = "LOADS"
except Exception as problem:
    found["without the flag"] = type(problem).__name__
model = auto.from_pretrained(folder, trust_remote_code=True)
check = load_file(folder + "/check.safetensors")
inputs = {k.removeprefix("kwarg."): v for k, v in check.items() if k.startswith("kwarg.")}
with torch.no_grad():
    got = model(**inputs).logits
want, flat = check["result.0"], got.reshape(-1)
got = flat[:: max(1, -(-flat.numel() // len(want)))]
found["results"] = "bit-equal" if torch.equal(got, want) else f"{(got - want).abs().max():.1e}"
if model.can_generate() and "input_ids" in inputs:
    made = [model.generate(inputs["input_ids"][:1], max_new_tokens=tokens, do_sample=False,
                           min_new_tokens=tokens, use_cache=cache) for cache in (True, False)]
    found["tokens"] = f"{int((made[0] == made[1]).sum()) - made[0].shape[1] + tokens} of {tokens}"
step = torch.optim.SGD(model.parameters(), 1e-2)
loss = model.eval()(**inputs).logits.square().mean()
loss.backward()
step.step()
after = model(**inputs).logits.square().mean()
found["trains"] = bool(after < loss)
model.save_pretrained(again)
other = auto.from_pretrained(again, trust_remote_code=True)
same = all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
with torch.no_grad():
    found["reloads"] = same and torch.equal(model(**inputs).logits, other(**inputs).logits)
print(json.dumps(found))
'''


def run(folder: Path, version: str, place: Path, tokens: int) -> dict[str, object]:
    """What a version of transformers makes of a directory."""
    packages = place / version
    if not packages.exists():
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target",
                        str(packages), f"transformers=={version}"], check=True)
    with tempfile.TemporaryDirectory() as again:
        done = subprocess.run(
            [sys.executable, "-c", CHILD, str(folder), again, str(tokens)], text=True,
            capture_output=True, env={**os.environ, "PYTHONPATH": str(packages),
                                      "HF_MODULES_CACHE": f"{again}-code", "HF_HUB_OFFLINE": "1"})
    if done.returncode:
        return {"transformers": version, "fails": done.stderr.strip().splitlines()[-1]}
    found: dict[str, object] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def main() -> None:
    """Print a row for each directory and version."""
    ask = argparse.ArgumentParser(description=__doc__)
    ask.add_argument("folders", nargs="+", type=Path)
    ask.add_argument("--versions", nargs="+", default=["5.24.0"])
    ask.add_argument("--packages", type=Path, default=None, help="where versions are installed")
    ask.add_argument("--tokens", type=int, default=32)
    asked = ask.parse_args()
    place = asked.packages or Path(tempfile.mkdtemp())
    for folder in asked.folders:
        for version in asked.versions:
            print(folder.name, json.dumps(run(folder, version, place, asked.tokens)), flush=True)


if __name__ == "__main__":
    main()
