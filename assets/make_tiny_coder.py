"""Train ``assets/tiny_coder``: a Qwen2 of 5.8 M parameters on the source of the Python standard library.

Method. A byte-level BPE of 4,096 entries with Qwen2's own pre-tokenizer is trained on the training files, the
files are joined into one stream with ``<|endoftext|>`` between them, and the model reads it in windows: 512 tokens
long for most of the run, 1,024 at the end. Hidden matrices are updated by Muon (momentum, then orthogonalized by a
Newton-Schulz iteration), everything else by AdamW: the budget is less than one epoch on a CPU, and Muon is known to
make more of few tokens (not compared here). The learning rate holds and then falls linearly to zero.

Every row length of every matrix is a multiple of 256, so each GGUF block type fits the exported model.

One command, seeded:

    python assets/make_tiny_coder.py --tokens 6800000

``--device cuda`` trains in bf16 autocast; the CPU default is float32 (``--autocast`` is for CPUs with bf16 units).
Interrupted, the same command with ``--resume`` goes on from the last saved state.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from stdlib_source import SourceFile, fingerprint, iter_library
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

HERE = Path(__file__).resolve().parent
VOCABULARY = 4096
CONTEXT = 1024
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

# ChatML as Qwen2.5-Instruct renders it for plain conversations, its default system message included.
CHAT_TEMPLATE = """\
{%- if messages[0]['role'] != 'system' -%}
{{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def train_tokenizer(texts: list[str]) -> Qwen2Tokenizer:
    """Byte-level BPE with Qwen2's normalizer and pre-tokenizer, the chat tokens last in the vocabulary."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    model = json.loads(bpe.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=[tuple(merge) for merge in model["merges"]],  # type: ignore[misc]
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        unk_token=None,  # type: ignore[arg-type]
        additional_special_tokens=SPECIAL_TOKENS,
        model_max_length=CONTEXT,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    if len(tokenizer) != VOCABULARY:
        raise RuntimeError(f"tokenizer has {len(tokenizer)} entries, expected {VOCABULARY}")
    return tokenizer


def model_config(tokenizer: Qwen2Tokenizer) -> Qwen2Config:
    """Six layers, 256 wide, four query heads over two key/value heads, tied head."""
    return Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=tokenizer.vocab["<|endoftext|>"],
        eos_token_id=tokenizer.vocab["<|im_end|>"],
        pad_token_id=tokenizer.vocab["<|endoftext|>"],
    )


def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """Nearest semi-orthogonal matrices, float32 ``(n, out, in)``: five quintic Newton-Schulz steps (Jordan, Muon)."""
    x = matrices.mT if matrices.shape[1] > matrices.shape[2] else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if matrices.shape[1] > matrices.shape[2] else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalized per matrix; matrices of one shape are iterated as one batch.

    Float32 on purpose: torch's own Muon iterates in bf16, which most CPUs only emulate.
    """

    def __init__(self, matrices: list[torch.nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            shapes: dict[torch.Size, list[torch.nn.Parameter]] = {}
            for p in group["params"]:
                shapes.setdefault(p.shape, []).append(p)
            for shape, parameters in shapes.items():
                updates = []
                for p in parameters:
                    assert p.grad is not None
                    buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    buffer.lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(buffer, group["momentum"]))
                scale = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
                for p, update in zip(parameters, orthogonalize(torch.stack(updates)), strict=True):
                    p.add_(update, alpha=-scale)


def rate(done: int, total: int) -> float:
    """Share of the peak learning rate after ``done`` of ``total`` tokens: rise, hold, fall to zero in the last 45%."""
    return min(1.0, (done + 8_500) / 170_000, (1.0 - done / total) / 0.45)


def bits_per_byte(
    model: Qwen2ForCausalLM, documents: list[torch.Tensor], bytes_total: int, window: int = CONTEXT
) -> tuple[float, float]:
    """Bits per byte and nats per token over whole documents.

    Each document starts from ``<|endoftext|>`` and is read in windows of ``window`` tokens that do not overlap in what
    they score; nothing is carried from one window to the next.
    """
    device = next(model.parameters()).device
    nats, tokens = 0.0, 0
    model.eval()
    with torch.no_grad():
        for ids in tqdm(documents, desc="held out", leave=False):
            for start in range(0, len(ids) - 1, window):
                piece = ids[start : start + window + 1].to(device).long()
                logits = model(input_ids=piece[None, :-1], use_cache=False).logits[0].float()
                nats += F.cross_entropy(logits, piece[1:], reduction="sum").item()
                tokens += len(piece) - 1
    model.train()
    return nats / math.log(2) / bytes_total, nats / tokens


def encode(tokenizer: Qwen2Tokenizer, files: list[SourceFile]) -> list[torch.Tensor]:
    """Token ids of each file, int16-sized, between two ``<|endoftext|>``."""
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    encoded = tokenizer([f.text for f in files], add_special_tokens=False)["input_ids"]
    return [torch.tensor([end, *ids, end], dtype=torch.int16) for ids in encoded]


def windows_in_order(documents: list[torch.Tensor], window: int, epoch: int, seed: int) -> torch.Tensor:
    """All windows of ``window + 1`` tokens of one epoch's stream, shuffled; the files' order differs each epoch."""
    generator = torch.Generator().manual_seed(seed * 1000 + epoch)
    order = torch.randperm(len(documents), generator=generator).tolist()
    stream = torch.cat([documents[i][1:] for i in order])
    offset = int(torch.randint(window, (1,), generator=generator))
    count = (len(stream) - offset - 1) // window
    index = torch.randperm(count, generator=generator)
    starts = (offset + index * window)[:, None]
    return stream[starts + torch.arange(window + 1)]


def batches(documents: list[torch.Tensor], window: int, sequences: int, seed: int) -> Iterator[torch.Tensor]:
    """Endless batches ``(sequences, window + 1)`` of token ids."""
    epoch = 0
    while True:
        table = windows_in_order(documents, window, epoch, seed)
        for i in range(0, len(table) - sequences + 1, sequences):
            yield table[i : i + sequences].long()
        epoch += 1


def make_optimizers(model: Qwen2ForCausalLM, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embedding, norms and biases."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers = [
        Muon(matrices, lr=args.muon_lr),
        torch.optim.AdamW(others, lr=args.adam_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def train(model: Qwen2ForCausalLM, documents: list[torch.Tensor], probe, args: argparse.Namespace) -> None:
    """Train for ``args.tokens`` tokens; ``probe(model)`` gives the held-out figure shown on the way."""
    device = torch.device(args.device)
    optimizers = make_optimizers(model, args)
    state_file = args.work / "state.pt"
    done, step = 0, 0
    if args.resume and state_file.exists():
        state = torch.load(state_file, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        done, step = state["done"], state["step"]
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.autocast or device.type == "cuda")
    long_from = 0.75 * args.tokens
    window = 0
    bar = tqdm(total=args.tokens, initial=done, unit="tok", unit_scale=True, desc="train")
    smooth = None
    while done < args.tokens:
        wanted = 512 if done < long_from else CONTEXT
        if wanted != window:
            window = wanted
            source = batches(documents, window, args.batch_tokens // window, args.seed + (window == CONTEXT))
            # A resumed run takes up the order where it was left.
            begun = 0 if window == 512 else math.ceil(long_from / args.batch_tokens)
            for _ in range(step - begun):
                next(source)
        batch = next(source).to(device)
        share = rate(done, args.tokens)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * share
        total = 0.0
        parts = batch.split(max(1, args.micro_tokens // window))
        for part in parts:
            with autocast:
                logits = model(input_ids=part[:, :-1], use_cache=False).logits
            loss = F.cross_entropy(logits.float().flatten(0, 1), part[:, 1:].flatten()) * len(part) / len(batch)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        done += window * len(batch)
        step += 1
        smooth = total if smooth is None else 0.98 * smooth + 0.02 * total
        bar.update(window * len(batch))
        bar.set_postfix(loss=f"{smooth:.3f}", lr=f"{share:.2f}")
        if step % args.save_every == 0 or done >= args.tokens:
            args.work.mkdir(parents=True, exist_ok=True)
            state = {
                "model": model.state_dict(),
                "optimizers": [o.state_dict() for o in optimizers],
                "done": done,
                "step": step,
            }
            torch.save(state, state_file.with_suffix(".tmp"))
            state_file.with_suffix(".tmp").rename(state_file)
            tqdm.write(f"step {step} tokens {done} train {smooth:.4f} held-out sample {probe(model):.4f} bits/byte")
    bar.close()


def write_readme(folder: Path, record: dict) -> None:
    """The folder's README: what the model is, what it reaches, how it was made, and whose text it learned from."""
    (folder / "README.md").write_text(
        f"""# tiny_coder

A Qwen2 of {record["parameters"]:,} parameters (6 layers, 256 wide, 4 query heads over 2 key/value heads, QKV
biases, tied head, context {CONTEXT}) with a byte-level BPE of {VOCABULARY:,} entries, Qwen's pre-tokenizer and chat
tokens, in bf16. Trained on the source of the Python {record["python"]} standard library; it exists so that the
suite can be tried and tested offline on a model that was really trained.

| held out | bits per byte | nats per token |
|---|---|---|
| {record["held_out_files"]} files | {record["bits_per_byte"]} | {record["nats_per_token"]} |

Protocol: whole files, each from `<|endoftext|>` on, in windows of {CONTEXT} tokens that do not overlap, weights as
stored (bf16), arithmetic in float32. A file is held out if the SHA-256 of its path is divisible by 20
(`../stdlib_source.py`).

Made by `python assets/make_tiny_coder.py --tokens {record["tokens_trained"]}` (seed 0,
{record["training_files"]:,} training files; `training.json` has the arguments and the hash of the library). The goal
for this model is 1.10 bits per byte.

The standard library is Copyright (c) Python Software Foundation and its contributors, see
`../stdlib_instruct.LICENSE.md`; some of its files carry notices of their own. This folder holds weights, not text.
""",
        encoding="utf-8",
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=6_800_000)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--autocast", action="store_true", help="bf16 autocast on the CPU too")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--adam-lr", type=float, default=3e-3)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--micro-tokens", type=int, default=2048)
    parser.add_argument("--save-every", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--work", type=Path, default=Path("runs/make_tiny_coder"))
    parser.add_argument("--output", type=Path, default=HERE / "tiny_coder")
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    files = list(iter_library())
    train_files = [f for f in files if not f.held_out]
    held_files = [f for f in files if f.held_out]
    tokenizer = train_tokenizer([f.text for f in train_files])
    documents, held = encode(tokenizer, train_files), encode(tokenizer, held_files)
    train_bytes = sum(len(f.text.encode()) for f in train_files)
    held_bytes = sum(len(f.text.encode()) for f in held_files)
    train_tokens = sum(len(d) - 1 for d in documents)
    print(
        f"python {platform.python_version()}: {len(train_files)} training files, {train_bytes:,} bytes, "
        f"{train_tokens:,} tokens ({train_bytes / train_tokens:.2f} bytes a token); "
        f"{len(held_files)} held-out files, {held_bytes:,} bytes"
    )
    model = Qwen2ForCausalLM(model_config(tokenizer)).to(args.device)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters")

    # A fixed sample of held-out files for the progress line; the figure of record is over all of them.
    sample = held[::8]
    sample_bytes = sum(len(f.text.encode()) for f in held_files[::8])
    started = time.time()
    train(model, documents, lambda m: bits_per_byte(m, sample, sample_bytes, 512)[0], args)

    # The figure is of the model as stored: rounded to bf16.
    model.to(torch.bfloat16).to(torch.float32)
    bpb, nats = bits_per_byte(model, held, held_bytes)
    print(f"held out: {bpb:.4f} bits per byte, {nats:.4f} nats per token")
    model.to(torch.bfloat16).save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    record = {
        "bits_per_byte": round(bpb, 4),
        "nats_per_token": round(nats, 4),
        "parameters": parameters,
        "tokens_trained": args.tokens,
        "python": platform.python_version(),
        "library_sha256": fingerprint(files),
        "training_files": len(train_files),
        "held_out_files": len(held_files),
        "held_out_bytes": held_bytes,
        "seconds": round(time.time() - started),
        "arguments": {k: str(v) for k, v in vars(args).items() if k not in ("work", "output")},
    }
    (args.output / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    write_readme(args.output, record)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
