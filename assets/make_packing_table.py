"""Low-bit packing beside what people use, at equal size: assets/packing.jsonl, and the table of README.

    pip install -r requirements-bench.txt
    python assets/make_packing_table.py             measure what is missing, a line each
    python assets/make_packing_table.py --summary   print the table, draw assets/packing.png

Two trained models (atto-qwen2-bias only where ../shared/data is), each on its own domain: the Python standard library
and TinyStories. Peers are llama.cpp's quantizer (without an importance matrix) and bitsandbytes' NF4 with double
quantization, which leaves embedding and head in 16 bits as transformers does. Ours gets, for each peer, exactly that
peer's bytes, all weights, scales, norms and biases of both counted and no tokenizer or metadata of either: the same
size with a calibration text, without one, and healed by votes on the training half of the domain. Since healing is
training, the unpacked model gets the same steps as a control.

Every model is scored by the same float32 code on weights as they come out of the file, so llama.cpp's rounding of
activations does not count against it. Loss is in nats a token; KL is the mean divergence from the unpacked model,
which tells small differences apart that the loss of a sample does not.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

ASSETS = Path(__file__).resolve().parent
ROOT = ASSETS.parent
sys.path[:0] = [str(ROOT), str(ASSETS)]

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from stdlib_source import iter_library  # noqa: E402
from transformers import AutoModelForCausalLM, PreTrainedModel  # noqa: E402

import gguf_export  # noqa: E402
import low_bit_calibration as calibration  # noqa: E402
import manifolds  # noqa: E402
from answer_masks import EncodedSet, encode_records  # noqa: E402
from dense_weights import open_dense  # noqa: E402
from entropy_coding import encode  # noqa: E402
from low_bit_healing import heal, put_on_packed_grids, rounded_grids  # noqa: E402
from packed_batches import PackedBatches, evaluation_batches  # noqa: E402
from prime_checkpoint import load_checkpoint  # noqa: E402
from prime_pack import carrier  # noqa: E402
from quality_tasks import sample  # noqa: E402
from qwen_prime_importer import ImportConfig  # noqa: E402
from qwen_prime_importer import main as import_model  # noqa: E402
from qwen_prime_wrapper import load_model, model_from_checkpoint  # noqa: E402
from training_recipe import Recipe  # noqa: E402
from vote_trainer import VoteTrainer  # noqa: E402

RESULTS = ASSETS / "packing.jsonl"
SHARED = ROOT.parent / "shared" / "data"
MODELS = {"tiny_coder": ASSETS / "tiny_coder", "atto": SHARED / "models" / "atto-qwen2-bias"}
GGUF_TYPES = ("Q8_0", "Q5_K_M", "Q4_K_M", "Q4_0")
PEERS = (*GGUF_TYPES, "NF4")
SMALL = {"4 bits": 4.0, "3.5 bits": 3.5, "3 bits": 3.0, "2.5 bits": 2.5}
"""Sizes that no peer has."""
HEALED = ("Q4_0", "3 bits")
TABLES = ("compact", "prime-harmonic")
SEQ_LEN, TRAIN_TOKENS, SCORED_TOKENS, CALIBRATION_ROWS = 512, 1_000_000, 24_000, 128
HEAL_STEPS, HEAL_ROWS, HEAL_RATE = 100, 4, 2e-4


def texts_of(name: str) -> tuple[list[str], list[str]]:
    """Texts of a model's own domain, to calibrate and heal on, and to score."""
    if name == "tiny_coder":
        files = list(iter_library())
        return [f.text for f in files if not f.held_out], [f.text for f in files if f.held_out]
    stories = json.loads((SHARED / "corpora" / "tinystories_850.json").read_text(encoding="utf-8"))
    return stories[:-150], stories[-150:]


class Bench:
    """One model: its checkpoint, its text, and what the unpacked model says of it."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.source = name, MODELS[name]
        self.checkpoint_path = folder / f"{name}.pt"
        import_model(ImportConfig(model=str(self.source), output=self.checkpoint_path, force=True))
        self.checkpoint = load_checkpoint(self.checkpoint_path)
        _, tokenizer, _ = load_model(self.checkpoint_path)
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        learn, scored = texts_of(name)
        self.train = sample(encode_records(learn, tokenizer, SEQ_LEN, progress=False), TRAIN_TOKENS)
        self.held = sample(encode_records(scored, tokenizer, SEQ_LEN, progress=False), SCORED_TOKENS)
        self.floats = sum(len(encode(carrier(t))) for n, t in self.checkpoint["model"].items() if ".grid." not in n)
        self.weights = sum(t.numel() for n, t in self.checkpoint["model"].items() if not n.endswith(".scale"))
        self.reference: list[torch.Tensor] = []
        self.loss = self.score(self.model(), keep=True)[0]
        self._costs: dict[str, calibration.Sensitivity] | None = None

    def model(self) -> PreTrainedModel:
        """A fresh unpacked model."""
        return model_from_checkpoint(self.checkpoint)

    def batches(self, part: EncodedSet, seed: int) -> PackedBatches:
        return PackedBatches(part, seq_len=SEQ_LEN, batch_size=1, pad_id=self.pad, seed=seed)

    @property
    def costs(self) -> dict[str, calibration.Sensitivity]:
        if self._costs is None:
            self._costs = calibration.measure(self.model(), islice(self.batches(self.train, 0), CALIBRATION_ROWS))
        return self._costs

    @torch.no_grad()
    def score(self, model: PreTrainedModel, keep: bool = False) -> tuple[float, float]:
        """Loss and divergence from the unpacked model, nats per token."""
        model.eval()
        loss = divergence = tokens = 0.0
        for number, batch in enumerate(evaluation_batches(self.held, SEQ_LEN, 1, self.pad)):
            out = model(
                input_ids=batch.input_ids, position_ids=batch.position_ids, attention_mask=None, use_cache=False
            )
            wanted = batch.labels[:, 1:] != -100
            found = F.log_softmax(out.logits[:, :-1][wanted].float(), dim=-1)
            if keep:
                self.reference.append(found)
            loss += float(F.nll_loss(found, batch.labels[:, 1:][wanted], reduction="sum"))
            divergence += float(F.kl_div(found, self.reference[number], reduction="sum", log_target=True))
            tokens += int(wanted.sum())
        return loss / tokens, divergence / tokens


# -- peers ------------------------------------------------------------------------------------------------------------


def gguf_peer(bench: Bench, kind: str, folder: Path) -> tuple[int, PreTrainedModel]:
    """Bytes of a GGUF file's tensors and the model that transformers makes of them."""
    import llama_cpp
    from gguf import GGUFReader

    full, small = folder / f"{bench.name}-F16.gguf", folder / f"{bench.name}-{kind}.gguf"
    if not full.exists():
        gguf_export.export_gguf(open_dense(bench.checkpoint_path), full, "F16", False)
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    settings.nthread = 1
    if llama_cpp.llama_model_quantize(str(full).encode(), str(small).encode(), settings):
        raise SystemExit(f"error: llama.cpp does not quantize {bench.name} to {kind}")
    size = sum(int(t.n_bytes) for t in GGUFReader(small).tensors)
    return size, AutoModelForCausalLM.from_pretrained(folder, gguf_file=small.name, dtype=torch.float32)


def nf4_peer(bench: Bench) -> tuple[int, PreTrainedModel]:
    """Every linear but the head in NF4 with double quantization, all else in bfloat16."""
    import bitsandbytes.functional as bnb

    model, _, _ = load_model(bench.source)
    size, done = 0, set()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            packed, state = bnb.quantize_4bit(
                module.weight.data.bfloat16(), blocksize=64, quant_type="nf4", compress_statistics=True
            )
            module.weight.data = bnb.dequantize_4bit(packed, state).float()
            inner = state.state2
            size += packed.nbytes + state.absmax.nbytes + inner.absmax.nbytes + inner.code.nbytes + 4
            done.add(id(module.weight))
    for parameter in model.parameters():
        if id(parameter) not in done:
            parameter.data = parameter.data.bfloat16().float()
            size += 2 * parameter.numel()
    return size, model


# -- ours -------------------------------------------------------------------------------------------------------------


def ours(
    bench: Bench, size: int, *, text: bool = True, table: str = "linear"
) -> tuple[int, PreTrainedModel, dict[str, Any]]:
    """Bytes of a packed file's model, and the model, in at most ``size`` bytes."""
    model = bench.model()
    costs = bench.costs if text else calibration.without_text(model)
    grids = calibration.quantize(model, costs, size - bench.floats, name=table)
    put_on_packed_grids(model, grids)
    return bench.floats + sum(calibration.stored_bytes(g) for g in grids.values()), model, grids


def recipe() -> Recipe:
    return Recipe(
        steps=HEAL_STEPS,
        grad_accum=HEAL_ROWS,
        lr=HEAL_RATE,
        warmup=HEAL_STEPS // 10,
        compute="float32",
        gradient_checkpointing=False,
        device="cpu",
    )


def healed(bench: Bench, size: int) -> tuple[int, PreTrainedModel]:
    """As :func:`ours`, then trained by votes on the packed grids; rounded to fewer bytes beforehand by what training
    adds to the codes' entropy, until the result fits."""
    room = size
    plans = calibration.plans_of(bench.model(), dict(bench.costs), 0)
    while True:
        _, _, grids = ours(bench, room)
        model = bench.model()
        put_on_packed_grids(model, grids, lambda grid, packed: calibration.unrounded(grid, packed, plans[grid.name]))
        for _ in heal(model, bench.batches(bench.train, 1), recipe()):
            pass
        grids = rounded_grids(model)
        stored = bench.floats + sum(calibration.stored_bytes(g) for g in grids.values())
        if stored <= size:
            return stored, model
        room -= int(1.05 * (stored - size)) + 256


def control(bench: Bench) -> PreTrainedModel:
    """The unpacked model after the steps that healing takes."""
    model = bench.model()
    trainer = VoteTrainer(model, bench.batches(bench.train, 1), recipe())
    for _ in range(HEAL_STEPS):
        trainer.step()
    return model


# -- results ----------------------------------------------------------------------------------------------------------


def lines(bench: Bench, done: set[tuple[str, str]], folder: Path) -> Iterator[dict[str, Any]]:
    """Measure what is missing."""

    def line(method: str, size: int | None, model: PreTrainedModel, **more: Any) -> dict[str, Any]:
        loss, divergence = bench.score(model)
        bits = None if size is None else round(8 * size / bench.weights, 4)
        return {
            "model": bench.name,
            "method": method,
            "bytes": size,
            "bits": bits,
            "loss": round(loss, 6),
            "increase": round(loss - bench.loss, 6),
            "kl": round(divergence, 6),
            **more,
        }

    def wanted(method: str) -> bool:
        return (bench.name, method) not in done

    sizes = {str(r["method"]): int(r["bytes"]) for r in read() if r["model"] == bench.name and r["method"] in PEERS}
    for peer in PEERS:
        if wanted(peer):
            size, model = nf4_peer(bench) if peer == "NF4" else gguf_peer(bench, peer, folder)
            sizes[peer] = size
            yield line(peer, size, model)
    sizes |= {name: int(bits * bench.weights / 8) for name, bits in SMALL.items()}
    kinds: Iterable[tuple[str, dict[str, Any]]] = [("text", {}), ("no text", {"text": False})]
    for peer in sizes:
        for label, settings in [*kinds, *((t, {"table": t}) for t in TABLES if peer == "Q4_0")]:
            if wanted(method := f"ours at {peer}, {label}"):
                size, model, _ = ours(bench, sizes[peer], **settings)
                yield line(method, size, model)
    if wanted("control"):
        yield line("control", None, control(bench), heal=[HEAL_STEPS, HEAL_ROWS, HEAL_RATE])
    for peer in HEALED:
        if wanted(method := f"ours at {peer}, healed"):
            size, model = healed(bench, sizes[peer])
            yield line(method, size, model, heal=[HEAL_STEPS, HEAL_ROWS, HEAL_RATE])


def read() -> list[dict[str, Any]]:
    if not RESULTS.is_file():
        return []
    return [json.loads(text) for text in RESULTS.read_text(encoding="utf-8").splitlines()]


def summary(results: list[dict[str, Any]]) -> str:
    """The table of README."""
    found = {(r["model"], r["method"]): r for r in results}
    rows = ["| model | at the bytes of | bits | its loss | ours, no text | ours | ours, healed (control) |"]
    rows.append("|---|---|---|---|---|---|---|")

    def cell(model: str, method: str) -> str:
        r = found.get((model, method))
        return "" if r is None else f"{r['increase']:+.4f} ({r['kl']:.4f})"

    for model in dict.fromkeys(r["model"] for r in results):
        for peer in (*PEERS, *SMALL):
            size = found.get((model, peer)) or found.get((model, f"ours at {peer}, text"))
            if size is None:
                continue
            cells = [cell(model, m) for m in (peer, *(f"ours at {peer}, {k}" for k in ("no text", "text", "healed")))]
            if cells[-1] and (model, "control") in found:
                cells[-1] = f"{cells[-1].split()[0]} ({found[model, 'control']['increase']:+.4f})"
            rows.append(f"| {model} | {peer} | {size['bits']:.3f} | {' | '.join(cells)} |")
    return "\n".join(rows)


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Divergence from the unpacked model against bits a weight, a panel for each model."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    models = list(dict.fromkeys(r["model"] for r in results))
    figure, axes = plt.subplots(1, len(models), figsize=(5.2 * len(models), 3.9), squeeze=False)
    for axis, model in zip(axes[0], models, strict=True):
        own = [r for r in results if r["model"] == model and r["bits"] is not None]
        for label, ending, colour in (("ours", ", text", "#1f6fb2"), ("ours, without text", ", no text", "#8fbbdd")):
            line = sorted(
                (r["bits"], r["kl"]) for r in own if r["method"].endswith(ending) and "healed" not in r["method"]
            )
            axis.plot(*zip(*line, strict=True), marker="o", markersize=3.5, label=label, color=colour)
        for r in own:
            if r["method"] in PEERS:
                axis.plot(r["bits"], r["kl"], marker="s", markersize=5, color="#c4502e", linestyle="")
                x, y = {"Q4_K_M": (6, 4), "Q5_K_M": (6, -11)}.get(r["method"], (-6, 6))
                axis.annotate(
                    r["method"],
                    (r["bits"], r["kl"]),
                    xytext=(x, y),
                    textcoords="offset points",
                    fontsize=8,
                    horizontalalignment="left" if x > 0 else "right",
                )
        axis.set_yscale("log")
        axis.set_xlabel("bits a weight, everything counted")
        axis.set_title(model, fontsize=10)
        axis.grid(alpha=0.25, which="both", linewidth=0.5)
    axes[0][0].set_ylabel("KL from the unpacked model, nats a token")
    axes[0][0].legend(fontsize=8, frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=140)


def main(arguments: argparse.Namespace) -> None:
    if arguments.summary:
        print(summary(read()))
        draw(read(), RESULTS.with_suffix(".png"))
        return
    torch.set_num_threads(arguments.threads)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    versions = {n: importlib.metadata.version(n) for n in ("torch", "llama-cpp-python", "bitsandbytes", "gguf")}
    about = {"commit": commit.stdout.strip(), "manifold": manifolds.build().name, **versions}
    for name in arguments.models:
        if not MODELS[name].is_dir():
            print(f"{name}: {MODELS[name]} is not here, skipped", file=sys.stderr)
            continue
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(name, Path(folder))
            print(f"{name}: {bench.loss:.4f} nats per token unpacked", file=sys.stderr)
            begun = time.process_time()
            for result in lines(bench, {(r["model"], r["method"]) for r in read()}, Path(folder)):
                result |= {"source_loss": round(bench.loss, 6), "cpu_seconds": round(time.process_time() - begun, 1)}
                with RESULTS.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(result | about) + "\n")
                print(json.dumps(result), file=sys.stderr, flush=True)
                begun = time.process_time()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--summary", action="store_true", help="print the table of what was measured")
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), default=list(MODELS))
    parser.add_argument("--threads", type=int, default=1)
    main(parser.parse_args())
