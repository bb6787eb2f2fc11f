"""Adapters of other origins: files made by each paper's formula merge to its forward pass."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

import spacompiler
from spacompiler.adapters import files, foreign, formulas, merging, origins
from spacompiler.errors import SpaError, UsageError

pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
OUT, IN, RANK = 12, 10, 4
G = torch.Generator()


def rand(*shape, scale=0.4):
    """Numbers that float32 holds, in float64."""
    return (torch.randn(*shape, generator=G) * scale).double()


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q = nn.Linear(IN, OUT)
        self.out_proj = nn.Linear(OUT, 5)

    def forward(self, x):
        return self.out_proj(self.to_q(x).tanh())


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.down_blocks = nn.ModuleList([Block()])
        self.conv_in = nn.Conv2d(3, 6, 3, padding=1)

    def forward(self, x, image):
        return self.down_blocks[0](x), self.conv_in(image)


def net():
    torch.manual_seed(0)
    return Net()


Q = "down_blocks.0.to_q"
FLAT = "down_blocks_0_to_q"
INPUTS = (torch.randn(7, IN, generator=torch.Generator().manual_seed(1)),
          torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(2)))
PEFT = {"peft_type": "LORA", "r": RANK, "lora_alpha": 6, "target_modules": ["to_q"]}


def pair(r=RANK):
    return rand(r, IN), rand(OUT, r)


# --- fixtures ---------------------------------------------------------------------------------
# Each returns (arrays, configuration or None, file name, forward): forward(x, w) is what the layer
# computes besides its bias, from its inputs and base weight, in float64, as the paper says.


def kohya(w):
    a, b = pair()
    return ({f"lora_unet_{FLAT}.lora_down.weight": a, f"lora_unet_{FLAT}.lora_up.weight": b,
             f"lora_unet_{FLAT}.alpha": torch.tensor(2.0)}, None, "k.safetensors",
            lambda x, w: x @ w.T + 2 / RANK * (x @ a.T) @ b.T)


def kohya_without_alpha(w):
    arrays, *rest, _ = kohya(w)
    a, b, _ = arrays.values()
    return ({k: v for k, v in arrays.items() if "alpha" not in k}, *rest,
            lambda x, w: x @ w.T + (x @ a.T) @ b.T)


def text_encoder_beside(w):
    """A pipeline's file: what belongs to the text encoder is another network's."""
    arrays, *rest = kohya(w)
    more = {f"lora_te_text_model_encoder_layers_0_mlp_fc1.{k.rpartition('lora_')[2]}": v
            for k, v in arrays.items() if "lora_down" in k or "lora_up" in k}
    more = {k.replace(".down", ".lora_down").replace(".up", ".lora_up"): v.clone()
            for k, v in more.items()}
    return ({**arrays, **more}, *rest)


def diffusers(w):
    a, b = pair()
    return ({f"unet.{Q}.lora_A.weight": a, f"unet.{Q}.lora_B.weight": b}, None, "d.safetensors",
            lambda x, w: x @ w.T + (x @ a.T) @ b.T)


def diffusers_transformer(w):
    """The configuration of each component stands in the file's own metadata."""
    a, b = pair()
    said = {"transformer.r": RANK, "transformer.lora_alpha": 6, "transformer.target_modules": [Q]}
    return ({f"transformer.{Q}.lora_A.weight": a, f"transformer.{Q}.lora_B.weight": b},
            {"metadata": said}, "d.safetensors",
            lambda x, w: x @ w.T + 6 / RANK * (x @ a.T) @ b.T)


def diffusers_processor(w):
    a, b = pair()
    name = "unet.down_blocks.0.processor.to_q_lora"
    return ({f"{name}.down.weight": a, f"{name}.up.weight": b}, None, "d.safetensors",
            lambda x, w: x @ w.T + (x @ a.T) @ b.T)


def dora(w):
    """Weight-decomposed: magnitudes of rows, as kohya and LyCORIS store them."""
    arrays, config, name, _ = kohya(w)
    a, b, alpha = arrays.values()
    m = rand(OUT, 1).abs() + 0.5

    def forward(x, w):
        v = w + alpha / RANK * b @ a
        return x @ (m * v / v.norm(dim=1, keepdim=True)).T

    return {**arrays, f"lora_unet_{FLAT}.dora_scale": m}, config, name, forward


def dora_of_columns(w):
    arrays, config, name, _ = kohya(w)
    a, b, alpha = arrays.values()
    m = rand(1, IN).abs() + 0.5

    def forward(x, w):
        v = w + alpha / RANK * b @ a
        return x @ (m * v / v.norm(dim=0, keepdim=True)).T

    return {**arrays, f"lora_unet_{FLAT}.dora_scale": m}, config, name, forward


def dylora(rank):
    def fixture(w):
        arrays, _, name, _ = kohya(w)
        a, b, alpha = arrays.values()
        return (arrays, None, f"{name}(rank={rank})",
                lambda x, w: x @ w.T + float(alpha) / rank * (x @ a[:rank].T) @ b[:, :rank].T)

    return fixture


def dylora_of_peft(w):
    a, b = pair()
    return (peft_arrays(a, b), PEFT, "dir(rank=2)",
            lambda x, w: x @ w.T + 6 / 2 * (x @ a[:2].T) @ b[:, :2].T)


def peft_arrays(a, b, **more):
    key = f"base_model.model.{Q}"
    return {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b,
            **{f"{key}.{k}": v for k, v in more.items()}}


def loha(w):
    w1a, w2a, w1b, w2b = rand(OUT, RANK), rand(OUT, RANK), rand(RANK, IN), rand(RANK, IN)
    key = f"lycoris_{FLAT}."
    return ({f"{key}hada_w1_a": w1a, f"{key}hada_w1_b": w1b, f"{key}hada_w2_a": w2a,
             f"{key}hada_w2_b": w2b, f"{key}alpha": torch.tensor(3.0)}, None, "h.safetensors",
            lambda x, w: x @ (w + 3 / RANK * (w1a @ w1b)
                              * (w2a @ w2b)).T)


def lokr(w):
    w1, a, b = rand(3, 2), rand(4, 2), rand(2, 5)
    key = f"lycoris_{FLAT}."
    return ({f"{key}lokr_w1": w1, f"{key}lokr_w2_a": a, f"{key}lokr_w2_b": b,
             f"{key}alpha": torch.tensor(1.0)}, None, "h.safetensors",
            lambda x, w: x @ w.T + (x.reshape(-1, 2, 5) @ (a @ b).T / 2).transpose(
                1, 2).matmul(w1.T).transpose(1, 2).reshape(len(x), OUT))


def lokr_whole(w):
    """Both sides whole: no rank, so no scale."""
    w1, w2 = rand(3, 2), rand(4, 5)
    key = f"lycoris_{FLAT}."
    return ({f"{key}lokr_w1": w1, f"{key}lokr_w2": w2, f"{key}alpha": torch.tensor(1.0)}, None,
            "h.safetensors", lambda x, w: x @ (w + (
                w1[:, None, :, None] * w2[None, :, None]).reshape(OUT, IN)).T)


def full(w):
    diff, bias = rand(OUT, IN), rand(OUT)
    return ({f"lycoris_{FLAT}.diff": diff, f"lycoris_{FLAT}.diff_b": bias}, None,
            "f.safetensors", lambda x, w: x @ (w + diff).T + bias)


def lora_xs(w):
    """B and A from the SVD of the weight, only R trained."""
    u, s, v = torch.linalg.svd(w, full_matrices=False)
    a, b, r = (v[:RANK] * s[:RANK, None]).contiguous(), u[:, :RANK].contiguous(), rand(RANK, RANK)
    return (peft_arrays(a, b, **{"default_lora_latent_mapping.weight": r}), PEFT, "dir",
            lambda x, w: x @ w.T + 6 / RANK * ((x @ a.T) @ r.T) @ b.T)


def lora_sb(w):
    """The same form from the first full step's SVD, without a scale."""
    a, b = pair()
    r = torch.diag(rand(RANK))
    return (peft_arrays(a, b, **{"default_lora_latent_mapping.weight": r}),
            {**PEFT, "lora_alpha": RANK}, "dir",
            lambda x, w: x @ w.T + ((x @ a.T) @ r.T) @ b.T)


def nlora(w):
    a, b, n = *pair(), rand(RANK, RANK)
    return (peft_arrays(a, b, **{"lora_N.weight": n}),
            {**PEFT, "init_lora_weights": "s_lora", "use_nlora": True}, "dir",
            lambda x, w: x @ w.T + 6 / RANK * ((x @ a.T) @ n.T) @ b.T)


def sora(w):
    """OpenDelta's pickle; some gates are zero."""
    a, b, gate = *pair(), torch.tensor([[0.5, 0.0, -2.0, 0.0]]).double()
    return ({f"{Q}.lora.lora_A": a, f"{Q}.lora.lora_B": b, f"{Q}.lora.gate": gate},
            {"delta_type": "lora", "lora_r": RANK, "lora_alpha": 16}, "pytorch_model.bin",
            lambda x, w: x @ w.T + 16 / RANK * ((x @ a.T) * gate) @ b.T)


def opendelta(w):
    arrays, config, name, _ = sora(w)
    a, b, _ = arrays.values()
    return ({k: v for k, v in arrays.items() if "gate" not in k}, config, name,
            lambda x, w: x @ w.T + 4 * (x @ a.T) @ b.T)


def loralib(w):
    """A bare state dict says no scale: it is given."""
    a, b = pair()
    return ({f"{Q}.lora_A": a, f"{Q}.lora_B": b}, None, "l.pt(alpha=8)",
            lambda x, w: x @ w.T + 2 * (x @ a.T) @ b.T)


def nola(w):
    alpha, beta = rand(6), rand(5)
    torch.manual_seed(7)
    bases = torch.empty(6, IN, RANK), torch.empty(5, RANK, OUT)
    for base in bases:
        nn.init.kaiming_uniform_(base, a=5 ** 0.5)
    a = torch.einsum("b,bdr->dr", alpha, bases[0].double())
    b = torch.einsum("b,bdr->dr", beta, bases[1].double())
    return ({f"{Q}.nola_alpha": alpha, f"{Q}.nola_beta": beta,
             f"{Q}.nola_A": bases[0][0, :10, 0].clone()},
            {"peft_type": "NOLA", "r": RANK, "seed": 7}, "dir",
            lambda x, w: x @ w.T + (x @ a) @ b / RANK)


def loldu(w):
    p, low, up = torch.linalg.lu(w)
    d = up.diagonal().clone()
    up = up / d[:, None]
    low, up, z = low[:, :RANK].contiguous(), up[:RANK].contiguous(), d[:RANK] + rand(RANK)
    key, s, s0 = f"{Q}.parametrizations.weight.0.", 0.7, 6 / RANK

    def forward(x, w):
        ends = p @ low, up
        rest = w - s0 * ends[0] @ torch.diag(d[:RANK]) @ ends[1]
        return x @ (rest + s * ends[0] @ torch.diag(z) @ ends[1]).T

    return ({f"{key}lora_A": up, f"{key}lora_B": low, f"{key}P": p, f"{key}vector_z": z,
             f"{key}scaling_factor": torch.tensor(s)},
            {"peft_type": "LOLDU", "lora_alpha": 6}, "dir", forward)


def triadapt(w):
    a, b = [rand(2, IN), rand(1, IN)], [rand(OUT, 2), rand(OUT, 1)]
    rows, columns = [rand(2, 2), rand(1, 3)], [rand(2, 2), rand(3, 1)]
    core = torch.zeros(3, 3).double()
    core[:2, :2] += rows[0] + columns[0]
    core[2:] += rows[1]
    core[:, 2:] += columns[1]
    lists = {"lora_A": a, "lora_B": b, "lora_C_row": rows, "lora_C_col": columns}
    return ({f"base_model.model.{Q}.{k}.{n}": x for k, xs in lists.items()
             for n, x in enumerate(xs)},
            {"peft_type": "TRIADAPTLORA", "lora_alpha": 6, "init_rank": 2}, "dir",
            lambda x, w: x @ w.T + 6 / (3 + 1e-5)
            * x @ torch.cat(a).T @ core.T @ torch.cat(b, 1).T)


def sltrain(w):
    """The layer has no weight of its own: what the base holds goes."""
    a, b, values = *pair(), rand(9)
    places = torch.randperm(OUT * IN, generator=G)[:9].sort().values
    sparse = torch.zeros(OUT * IN).double().index_copy(0, places, values).reshape(OUT, IN)
    return ({f"{Q}.lora_A": a, f"{Q}.lora_B": b, f"{Q}.sparse_value": values,
             f"{Q}.sparse_index": places}, {"lora_alpha": 6, "peft_type": "SLTRAIN"}, "dir",
            lambda x, w: 6 / RANK * (x @ a.T) @ b.T + x @ sparse.T)


def sltrain_checkpoint(w):
    """A whole checkpoint: layers that are not factorised come as they are."""
    arrays, _, _, forward = sltrain(w)
    base = net().state_dict()
    rest = {k: v for k, v in base.items() if k != f"{Q}.weight" and k != f"{Q}.bias"}
    return {**arrays, **rest}, None, "model.safetensors(alpha=6)", forward


def mos(turn):
    def fixture(w):
        a, b, va, vb = rand(RANK, 4), rand(5, RANK), rand(RANK, 3), rand(RANK, 3)
        wide = torch.zeros(RANK, 12).double(), torch.zeros(RANK, 15).double()
        for k in range(RANK):
            for j in range(3):
                at = (k + j) % RANK if turn else k
                wide[0][k, 4 * j:4 * j + 4] = va[k, j] * a[at]
                wide[1][k, 5 * j:5 * j + 5] = vb[k, j] * b.T[at]
        arrays = peft_arrays(a, b, lora_A_vec=va, lora_B_vec=vb)
        return (arrays, {**PEFT, "enable_lora_vec": True, "enable_lora_rotation": turn,
                         "reduce_lora_A_x": 3, "reduce_lora_B_x": 3}, "dir",
                lambda x, w: x @ w.T + 6 / RANK * (x @ wide[0][:, :IN].T)
                @ wide[1][:, :OUT])

    return fixture


def salt(w):
    u, s, v = torch.linalg.svd(w, full_matrices=False)
    scale, shift, xx, yy = 1 + rand(3), rand(3), rand(IN - 3, 2), rand(2, IN - 3)

    def forward(x, w):
        core = torch.zeros(IN, IN, dtype=torch.float64)
        core[:3, :3] = torch.diag(scale * s[:3] + shift)
        core[3:, 3:] = torch.diag(s[3:]) + xx @ yy
        return x @ (u @ core.clamp_min(0) @ v).T

    return ({f"{Q}.trainable_scale_A": scale, f"{Q}.trainable_shift_B": shift,
             f"{Q}.trainable_X": xx, f"{Q}.trainable_Y": yy, f"{Q}.U": u.contiguous(),
             f"{Q}.S": s, f"{Q}.Vt": v.contiguous()}, None, "s.safetensors", forward)


def svfit(w):
    u, s, v = torch.linalg.svd(w, full_matrices=False)
    new = s[:RANK] + rand(RANK)
    rest = w - u[:, :RANK] * s[:RANK] @ v[:RANK]
    return ({f"{Q}.svfit_S": new}, {"peft_type": "SVFIT"}, "dir",
            lambda x, w: x @ (rest + u[:, :RANK] * new @ v[:RANK]).T)


def snell(threshold, power=2.0):
    def fixture(w):
        p, q = rand(2, IN, 3), rand(2, OUT, 3)
        c = 0.1 * torch.tensor([1.0, -1.0]).reshape(2, 1, 1)
        change = sum(c[h] * torch.stack([torch.stack([
            (p[h, i] - q[h, o]).abs().pow(power).sum() ** (1 / power)
            for o in range(OUT)]) for i in range(IN)]) for h in range(2)).T
        if threshold:
            large = change.abs() > change.abs().quantile(threshold)
            change = torch.where(large, change * change.abs(), 0.0)
        one = "" if threshold else "_1"
        name = f"{Q.replace('to_q', 'additional_to_q')}.learnable"
        return ({f"{name}.In_Qs{one}": p, f"{name}.Out_Qs{one}": q,
                 f"{name}.shared_coeff_fc": c},
                {"peft_type": "SNELL", "norm_p": power,
                 **({"init_thres": threshold} if threshold else {})}, "dir",
                lambda x, w: x @ (w + change).T)

    return fixture


def snella(w):
    """The sum over heads mixed with its softmax over outputs; each layer has its threshold."""
    p, q, (alpha, gamma, beta) = rand(2, IN, 3), rand(2, OUT, 3), rand(3, 1).abs() + 0.5
    c = 0.1 * torch.tensor([1.0, -1.0]).reshape(2, 1, 1)
    k = sum(c[h] * (p[h][:, None] - q[h][None]).square().sum(-1).sqrt() for h in range(2))
    e = (k / gamma).exp()
    mixed = k + alpha * e / e.sum(1, keepdim=True) + beta
    change = torch.where(mixed.abs() > mixed.abs().quantile(0.25), mixed * mixed.abs(), 0.0).T
    arrays = {"In_Qs": p, "Out_Qs": q, "shared_coeff_fc": c, "alpha": alpha, "gamma": gamma,
              "beta": beta}
    return ({f"{Q}.learnable.{n}": x for n, x in arrays.items()},
            {"peft_type": "SNELLA", "init_thres": {Q: 0.25}}, "dir",
            lambda x, w: x @ (w + change).T)


def break_for_make(w):
    """Content and style: two halves side by side are one LoRA of twice the rank."""
    (a1, b1), (a2, b2) = pair(2), pair(3)
    return ({f"unet.{Q}.lora_A.weight": torch.cat([a1, a2]),
             f"unet.{Q}.lora_B.weight": torch.cat([b1, b2], 1)}, None, "b.safetensors",
            lambda x, w: x @ w.T + (x @ a1.T) @ b1.T + (x @ a2.T) @ b2.T)


FIXTURES = {
    "kohya": kohya, "kohya without alpha": kohya_without_alpha,
    "kohya with a text encoder": text_encoder_beside, "kohya dora": dora,
    "lycoris dora of columns": dora_of_columns, "diffusers": diffusers,
    "diffusers transformer": diffusers_transformer, "diffusers processor": diffusers_processor,
    "lycoris loha": loha, "lycoris lokr": lokr, "lycoris lokr whole": lokr_whole,
    "lycoris full": full,
    "dylora rank 1": dylora(1), "dylora rank 3": dylora(3), "dylora of peft": dylora_of_peft,
    "lora-xs": lora_xs, "lora-sb": lora_sb, "nlora": nlora, "sora": sora, "opendelta": opendelta,
    "loralib": loralib, "nola": nola, "loldu": loldu, "triadaptlora": triadapt,
    "sltrain": sltrain, "sltrain checkpoint": sltrain_checkpoint, "mos": mos(False),
    "mos with rotation": mos(True), "salt": salt,
    "svfit": svfit, "snell": snell(0.6), "snell of another norm": snell(0.3, 3.0),
    "snell without a threshold": snell(0.0), "snella": snella, "break-for-make": break_for_make}


def stored(place, arrays, config, name):
    """Write a fixture, and return what is given for it on the command line."""
    file, _, options = name.partition("(")
    target = place / file
    said = (config or {}).pop("metadata", None) if config and "metadata" in config else None
    if config:
        target = place / (file if file == "dir" else "dir")
        target.mkdir()
        key = files.CONFIG if "peft_type" in config else "config.json"
        (target / key).write_text(json.dumps(config))
        path = target / (files.WEIGHTS if file == "dir" else file)
    else:
        path = target
    arrays = {k: (v.float() if v.is_floating_point() else v).contiguous()
              for k, v in arrays.items()}
    if path.suffix in (".bin", ".pt"):
        torch.save(arrays, path)
    else:
        save_file(arrays, path, {"lora_adapter_metadata": json.dumps(said)} if said else None)
    return f"{target}({options}" if options else str(target)


def made(name, place):
    """(what is given, forward) of a fixture."""
    G.manual_seed(3)
    weight = net().get_submodule(Q).weight.detach().double()
    arrays, config, file, forward = FIXTURES[name](weight)
    return stored(place, arrays, dict(config) if config else None, file), forward


def merged(text, module=None, **kwargs):
    module = module or net()
    adapter, notes = foreign.resolved(foreign.read(*files.parse(text)), module)
    return merging.merge(module, [adapter], INPUTS, **kwargs)[0], notes


def hooked(module, forward):
    layer = module.get_submodule(Q)

    def hook(part, args, result):
        got = forward(args[0].double(), part.weight.detach().double())
        return got.float() + part.bias.detach()

    layer.register_forward_hook(hook)
    with torch.no_grad():
        return module(*INPUTS)[0]


def test_every_origin_has_a_fixture(tmp_path):
    found = set()
    for name in FIXTURES:
        place = tmp_path / name.replace(" ", "-")
        place.mkdir()
        found |= {n.partition("read as ")[2] for n in merged(made(name, place)[0])[1]
                  if "read as" in n}
    assert found | {"LyCORIS LoCon (Tucker)"} == {o.name for o in origins.ORIGINS}


@pytest.mark.parametrize("name", FIXTURES)
def test_an_adapter_merges_to_its_papers_forward_pass(name, tmp_path):
    text, forward = made(name, tmp_path)
    want = hooked(net(), forward)
    with torch.no_grad():
        plain, got = net()(*INPUTS)[0], merged(text)[0](*INPUTS)[0]
    assert (plain - want).abs().max() > 1e-3, "the adapter does nothing: nothing was tested"
    assert (got - want).abs().max() <= 1e-6


@pytest.mark.parametrize("mid", [False, True])
def test_a_convolution(mid, tmp_path):
    """A 3 x 3 pair, and a Tucker core between two 1 x 1 ones, as LyCORIS stores them."""
    G.manual_seed(4)
    b = rand(6, RANK, 1, 1)
    a, core = (rand(RANK, 3, 1, 1), rand(RANK, RANK, 3, 3)) if mid else (rand(RANK, 3, 3, 3), None)
    arrays = {"lora_unet_conv_in.lora_down.weight": a, "lora_unet_conv_in.lora_up.weight": b,
              "lora_unet_conv_in.alpha": torch.tensor(2.0)}
    if mid:
        arrays["lora_unet_conv_in.lora_mid.weight"] = core
    text = stored(tmp_path, arrays, None, "c.safetensors")
    image = INPUTS[1].double()
    inner = F.conv2d(F.conv2d(image, a), core, padding=1) if mid else F.conv2d(image, a, padding=1)
    with torch.no_grad():
        want = net()(*INPUTS)[1] + (2 / RANK * F.conv2d(inner, b)).float()
        got = merged(text)[0](*INPUTS)[1]
    assert (got - want).abs().max() <= 1e-6


def test_a_combined_adapter_is_not_kept(tmp_path):
    text, _ = made("lora-xs", tmp_path)
    with pytest.raises(UsageError, match="combined adapter cannot be kept"):
        spacompiler.compile(net(), INPUTS, adapter=text, keep_adapter=True, combine="dare",
                            target="params=60%", importance="magnitude")


@pytest.mark.parametrize("way", ["=0.5", "cat", "lego"])
def test_adapters_of_two_origins_combine(way, tmp_path):
    """Each is LoRA once it is read, so that weights and combinations are the same for all."""
    texts = []
    for name in ("kohya", "lora-xs"):
        place = tmp_path / name
        place.mkdir()
        texts.append(made(name, place)[0])
    change = [merged(t)[0].get_submodule(Q).weight - net().get_submodule(Q).weight for t in texts]
    module = net()
    first = f"{texts[0]}=0.5" if way == "=0.5" else texts[0]
    adapters = [foreign.resolved(foreign.read(*files.parse(t)), module)[0]
                for t in (first, texts[1])]
    got, _ = merging.merge(module, adapters, INPUTS, combine=way if way == "lego" else "cat")
    got = got.get_submodule(Q).weight - net().get_submodule(Q).weight
    want = (0.5 if way == "=0.5" else 1.0) * change[0] + change[1]
    assert torch.allclose(got, want, atol=1e-6) == (way != "lego")


def test_compile_with_a_single_file(tmp_path):
    """From Python and as a recipe: merged before pruning, or kept and cut beside the base."""
    text, _ = made("lora-xs", tmp_path)
    options = {"target": "params=60%", "importance": "magnitude", "align": 1, "latency": False,
               "onnx": False}
    result = spacompiler.compile(net(), INPUTS, adapter=text, **options)
    assert any("read as LoRA-XS" in note for note in result.job.notes)
    kept = spacompiler.compile(net(), INPUTS, adapter=text, keep_adapter=True, **options)
    assert "adapter = pruned merged model" in kept.job.notes[-1]


def test_whole_layers_of_a_checkpoint_are_taken(tmp_path):
    text, _ = made("sltrain checkpoint", tmp_path)
    head = "down_blocks.0.out_proj.weight"
    edit(text.partition("(")[0], **{head: torch.full((5, OUT), 0.25)})
    module, notes = merged(text)
    assert torch.equal(module.state_dict()[head], torch.full((5, OUT), 0.25))
    assert any("replaced whole" in note for note in notes)


# --- errors -----------------------------------------------------------------------------------


def edit(text, **arrays):
    """Add arrays to a stored file (None takes one away)."""
    from safetensors.torch import load_file

    path = Path(text) if Path(text).is_file() else Path(text) / files.WEIGHTS
    new = {**load_file(path), **arrays}
    save_file({k: v for k, v in new.items() if v is not None}, path)


K = f"lora_unet_{FLAT}"
WRONG = {
    "one array missing": ({f"{K}.lora_up.weight": None}, "not whole"),
    "one array more": ({f"{K}.lora_other.weight": torch.ones(2)}, "not understood"),
    "a layer that is not there": ({"lora_unet_mid_block_x.lora_down.weight": torch.ones(2, 3),
                                   "lora_unet_mid_block_x.lora_up.weight": torch.ones(3, 2)},
                                  "mid_block_x"),
    "another shape": ({f"{K}.lora_down.weight": torch.ones(RANK, IN + 1)}, "does not fit"),
    "NaN": ({f"{K}.alpha": torch.tensor(float("nan"))}, "NaN or infinity"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_file_that_is_not_whole(case, tmp_path):
    arrays, words = WRONG[case]
    text, _ = made("kohya", tmp_path)
    edit(text, **arrays)
    with pytest.raises(SpaError) as error:
        merged(text)
    assert words in str(error.value) and error.value.fix


@pytest.mark.parametrize("kind, key, words", [
    ("SMORA", "lora_A.weight", "depends on the input"), ("", "lora_router.weight", "token"),
    ("PROMPT_TUNING_LORA", "prompt_embeddings", "position"), ("", "prompt_embeddings", "DePT"),
    ("CMLORA", "lora_A.weight", "denoising"), ("", "atp_gate.weight", "tokens")])
def test_what_no_weight_can_express(kind, key, words, tmp_path):
    text = stored(tmp_path, {f"{Q}.{key}": torch.ones(2, 2)}, {"peft_type": kind} if kind else
                  None, "dir" if kind else "x.safetensors")
    with pytest.raises(SpaError, match="cannot be merged") as error:
        foreign.read(*files.parse(text))
    assert words in error.value.why


@pytest.mark.parametrize("name, key, value", [
    ("lora-xs", "use_dora", True), ("nlora", "more_gates", 3), ("triadaptlora", "bias", "all"),
    ("mos", "enable_lora_bias", True)])
def test_a_configuration_that_says_more(name, key, value, tmp_path):
    text, _ = made(name, tmp_path)
    file = Path(text) / files.CONFIG
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    with pytest.raises(SpaError, match=f"not understood: {key}"):
        merged(text)


@pytest.mark.parametrize("name, key", [("snell", "init_thres"), ("nola", "seed"),
                                       ("lora-xs", "lora_alpha"), ("triadaptlora", "lora_alpha")])
def test_a_configuration_that_says_too_little(name, key, tmp_path):
    text, _ = made(name, tmp_path)
    file = Path(text) / files.CONFIG
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items()
                                if k != key}))
    with pytest.raises(SpaError, match="does not say its"):
        merged(text)


def test_random_bases_of_another_generator_are_refused(tmp_path):
    text, _ = made("nola", tmp_path)
    edit(text, **{f"{Q}.nola_A": torch.ones(10)})
    with pytest.raises(SpaError, match="not those drawn here"):
        merged(text)


@pytest.mark.parametrize("text, words", [
    ("a(rang=4)", "no option 'rang'"), ("a(rank='4')", "no option"), ("a(rank=)=1", "cannot read"),
    ("a(rank=4)=x", "cannot read the weight")])
def test_options_of_an_adapter(text, words):
    with pytest.raises(UsageError) as error:
        files.parse(text)
    assert words in str(error.value)


def test_a_rank_that_is_not_there(tmp_path):
    text, _ = made("kohya", tmp_path)
    with pytest.raises(UsageError, match="rank=9 of an adapter of rank 4"):
        merged(f"{text}(rank=9)")


def test_a_pickle_gives_nothing_but_arrays(tmp_path):
    torch.save({"x": object()}, tmp_path / "a.pt")
    with pytest.raises(SpaError, match="cannot be read") as error:
        foreign.read(tmp_path / "a.pt")
    assert "safetensors" in error.value.fix


def test_the_documentation_names_every_origin():
    page = (Path(__file__).parents[2] / "docs" / "adapters.md").read_text(encoding="utf-8")
    for origin in origins.ORIGINS:
        assert getattr(formulas, origin.formula.__name__).__doc__
        assert origin.name in page
    assert all(word in page for word in ("SMoRA", "DePT", "ATP-LLaVA", "denoising"))
