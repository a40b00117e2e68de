"""transformers with 16-bit indices: the quantizer plug-in, the folder that it opens, the optimizer that trains it.

Importing this module registers quantization method ``prime``. ``from_pretrained`` then opens a folder that
:func:`export_prime_hf` (or ``save_pretrained``) wrote: the decoder is built on meta, its linears and embeddings become
ghost modules, and the indices go straight from the file into them. ``save_pretrained`` writes such a folder again,
``model.dequantize()`` makes the model dense in place, and transformers' Trainer and TRL's SFTTrainer train it with
:class:`PrimeVoteOptimizer`.

Without the plug-in, transformers skips an unknown quantization method with a warning, finds none of the weights that
it expects, and returns a model of random numbers. ``auto_map`` alone does not prevent that: where transformers knows
the model type, it asks for no custom code. So every folder holds one tensor that the dense model has and the ghost
model has not, the embedding's weight, in an impossible shape: transformers, and every other reader that checks shapes,
stops there. With ``trust_remote_code=True`` the folder's own ``modeling_prime.py`` opens it, dense.

The optimizer learns of micro-batches from the model itself: a forward pass in training mode opens the ballot, its
backward pass votes, ``step`` counts what was cast. There is no second pass to measure a first gradient with, as the
suite's own trainer makes one: the very first micro-batch of a run is measured and does not vote.
"""

from __future__ import annotations

import logging
import re
import shutil
import types
import weakref
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, overload

import torch
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

import manifolds
import modeling_prime
from ballots import Ballot, VoteRule
from dense_weights import DenseSource, ExportError
from ghost_core import GhostLinearTandem, Movement, apply_votes, grids_of, name_grids
from ghost_grid import SLICE_ELEMENTS
from hf_export import FOLDER_FILES, StoredTensor, folder_config, write_companions, write_json, write_shards
from manifolds import Manifold
from momentum_rules import MomentumRule
from qwen_prime_wrapper import INDEX_METHOD, expected_tensors, restore_modules, swap_modules
from vote_rules import rule_named
from whole_output import new_folder

log = logging.getLogger("prime_hf")

_CODE = Path(modeling_prime.__file__)
_HEAD_USE = 0
"""Which of a grid's uses the head is, as in ``ghost_core``."""


# -- the plug-in ------------------------------------------------------------------------------------------------------


@register_quantization_config(INDEX_METHOD)
class PrimeConfig(QuantizationConfigMixin):
    """``quantization_config`` of a folder's config.json: which table the indices point into."""

    def __init__(self, manifold: str, sha256: str, vote_bits: int = 0, **_: Any) -> None:
        self.quant_method = INDEX_METHOD  # type: ignore[assignment]
        self.manifold = manifold
        self.sha256 = sha256
        self.vote_bits = vote_bits


@register_quantizer(INDEX_METHOD)
class PrimeQuantizer(HfQuantizer):
    """Loads, saves and dequantizes; see the module docstring."""

    quantization_config: Any

    def __init__(self, quantization_config: QuantizationConfigMixin, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        if not self.pre_quantized:
            raise ValueError(
                "quant_method prime opens folders of indices and does not convert dense ones: run "
                "qwen_prime_importer.py, then qwen_prime_pack.py export --to prime-hf"
            )

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Always float32: scales, norms and biases are; use autocast or ``dequantize(dtype)`` for another."""
        if dtype not in (torch.float32, None):
            log.warning("dtype %s: PRIME weights have none; norms and biases load as float32, use autocast", dtype)
        return torch.float32

    def update_device_map(self, device_map: Any) -> Any:
        places = device_map.values() if isinstance(device_map, dict) else [device_map]
        if "disk" in map(str, places):
            raise ValueError("a PRIME model cannot be offloaded to disk: leave the disk out of device_map")
        return device_map

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        files = checkpoint_files or []
        with torch.device("meta"):
            swap_modules(model, self._manifold(files))
        _arrange(model)
        found = {name for file in files for name in _names(file)}
        if files and (missing := sorted(set(expected_tensors(model)) - found)):
            # transformers only warns, and fills them with what was in memory.
            raise ValueError(f"the folder lacks {len(missing)} tensors of its model, first {missing[0]}: export again")

    def _manifold(self, files: list[str]) -> Manifold:
        config = self.quantization_config
        if config.manifold in manifolds.NAMES:
            built = manifolds.build(config.manifold)
            if (built.sha256, built.vote_bits) == (config.sha256, config.vote_bits):
                return built
        for file in files:
            if modeling_prime.TABLE in _names(file):
                with safe_open(file, "pt") as opened:
                    table = manifolds.from_values(
                        config.manifold, opened.get_tensor(modeling_prime.TABLE), config.vote_bits
                    )
                if table.sha256 == config.sha256:
                    return table
        raise ValueError(f"the folder has no table {config.manifold} of sha256 {config.sha256[:16]}...: export again")

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        name_grids(model, Ballot(MomentumRule()))
        model.save_pretrained = types.MethodType(_save_pretrained, model)  # type: ignore[method-assign]

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """What ``save_pretrained`` writes: the model's tensors, its table, and the guard."""
        table = next(iter(grids_of(model).values())).manifold
        return {**model.state_dict(), **_extras(table)}, {}

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        restore_modules(model, dtype or torch.float32)
        for name in ("save_pretrained", "_keys_to_ignore_on_load_unexpected", "_keys_to_ignore_on_save"):
            model.__dict__.pop(name, None)
        model.config.dtype = dtype or torch.float32
        model.config.__dict__.pop("auto_map", None)
        return model

    def is_serializable(self) -> bool:
        """Folders are written as they are read."""
        return True

    @property
    def is_trainable(self) -> bool:
        """With :class:`PrimeVoteOptimizer`."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """The weights themselves are trained; no adapter is needed."""
        return True


class _DenseWeight(torch.autograd.Function):
    """A grid's weights as one dense tensor whose gradient is cast as votes."""

    @staticmethod
    def forward(ctx, anchor: torch.Tensor | None, grid: Any) -> torch.Tensor:
        ctx.grid = grid
        return grid.dequantize()

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        grid = ctx.grid
        if grid.wants_gradient():
            for k, rows in enumerate(grid.slices()):
                order = torch.arange(rows.start, rows.stop, device=gradient.device)
                grid.accept(grid.shared(gradient[rows].float()), order, _HEAD_USE, k)
        return None, None


class PrimeHead(GhostLinearTandem):
    """A head whose ``weight`` can be read: losses that multiply by ``lm_head.weight`` themselves (TRL's fused head)
    find it, and their gradient votes. It is dense while it is in use."""

    @property
    def weight(self) -> torch.Tensor:
        """float32 ``(out, in)``."""
        return _DenseWeight.apply(self.grid.anchor, self.grid)


def _arrange(model: PreTrainedModel) -> None:
    """Fit a swapped model to transformers' loading and saving: a readable head, and one name for a tied grid."""
    head = model.get_output_embeddings()
    readable: Any = PrimeHead(head.grid)
    readable.bias = head.bias
    model.set_output_embeddings(readable)
    # A set, whatever the class has: transformers unites it with another.
    model._keys_to_ignore_on_load_unexpected = {
        *(model._keys_to_ignore_on_load_unexpected or ()),
        *(f"^{re.escape(name)}$" for name in (modeling_prime.TABLE, modeling_prime.GUARD)),
    }
    if readable.grid is model.get_input_embeddings().grid:
        prefix = next(name for name, module in model.named_modules() if module is readable)
        model._keys_to_ignore_on_save = [f"{prefix}.grid.indices", f"{prefix}.grid.scale"]
        readable.register_state_dict_post_hook(_drop_grid)


def _drop_grid(module: Any, state: dict[str, Any], prefix: str, _: Any) -> None:
    for name in ("grid.indices", "grid.scale"):
        state.pop(prefix + name, None)


def _save_pretrained(model: PreTrainedModel, save_directory: Any, *args: Any, **kwargs: Any) -> None:
    """``save_pretrained`` of the model's class, and the code that opens the folder without this module."""
    type(model).save_pretrained(model, save_directory, *args, **kwargs)
    shutil.copyfile(_CODE, Path(save_directory) / _CODE.name)


def _names(file: str) -> list[str]:
    with safe_open(file, "pt") as opened:
        return list(opened.keys())


def _extras(table: Manifold) -> dict[str, torch.Tensor]:
    """The table, and a tensor that no dense model can load."""
    return {modeling_prime.TABLE: table.values.cpu(), modeling_prime.GUARD: torch.full((1,), torch.nan)}


# -- the folder -------------------------------------------------------------------------------------------------------


def export_prime_hf(source: DenseSource, output: Path, shard_size: int, force: bool) -> list[str]:
    """Write the folder ``output``: indices, scales, norms, biases, table, and all that a dense folder has beside its
    weights. Votes are left behind.

    Returns:
        Names of the weight files.

    Raises:
        OutputError: the folder exists, or cannot be written; nothing is left behind.
    """
    table = source.manifold
    config = folder_config(source, "float32")
    if config["model_type"] not in ("qwen2", "qwen3"):
        raise ExportError(f"model_type is {config['model_type']!r}, --to prime-hf writes qwen2 and qwen3")
    config["auto_map"] = {"AutoModelForCausalLM": f"{_CODE.stem}.{modeling_prime.PrimeForCausalLM.__name__}"}
    config["quantization_config"] = PrimeConfig(table.name, table.sha256, table.vote_bits).to_dict()
    tensors = [
        StoredTensor(name, tensor.dtype, tuple(tensor.shape), _without_votes(tensor, table))
        for name, tensor in source.checkpoint["model"].items()
    ]
    tensors += [StoredTensor(n, t.dtype, tuple(t.shape), [t]) for n, t in _extras(table).items()]
    with new_folder(output, force, FOLDER_FILES) as folder:
        write_json(folder / "config.json", config)
        write_companions(folder, source)
        shutil.copyfile(_CODE, folder / _CODE.name)
        return write_shards(folder, tensors, shard_size)


def _without_votes(tensor: torch.Tensor, table: Manifold) -> Iterator[torch.Tensor]:
    if tensor.dtype != torch.int16 or table.vote_bits == 0:
        yield tensor
        return
    step = max(1, SLICE_ELEMENTS // tensor.shape[1])
    for start in range(0, len(tensor), step):
        yield table.levels(tensor[start : start + step]) << table.vote_bits


# -- training ---------------------------------------------------------------------------------------------------------


def _begin_micro_batch(
    optimizer: weakref.ref[PrimeVoteOptimizer],
    listened: weakref.ref[PreTrainedModel],
    model: torch.nn.Module,
    given: Any,
) -> None:
    """The hook of a model's forward pass: tell its optimizer, while there is one. A copy of the model has a copy of the
    hook and is nobody's."""
    mine = optimizer()
    if mine is not None and getattr(model, "_is_replica", False):
        raise RuntimeError(
            "PrimeVoteOptimizer does not sum votes over cards, and torch.nn.DataParallel spreads this model over "
            "several: run with CUDA_VISIBLE_DEVICES=0"
        )
    if mine is not None and listened() is model and mine.listens():
        mine._begin(model, given)


class PrimeVoteOptimizer(torch.optim.AdamW):
    """Votes for the grids, AdamW for norms and biases; give it to a Trainer as ``optimizers=(optimizer, None)``.

    The learning rate of the (only) parameter group is that of both, so schedulers work as usual. Micro-batches are
    counted by the model's forward passes in training mode; a step may have fewer than ``micro_batches`` (the end of an
    epoch) and not more. ``state_dict`` holds votes, row state and step, so a Trainer's checkpoints resume exactly.
    A micro-batch whose loss is not finite does not vote, and not finite gradients of norms and biases skip their step.
    One process only: votes are not summed over processes. No GradScaler: votes have no overflow, and a scaled loss is
    not what they count. A second one on the same model begins without votes, and the first no longer hears the model.
    """

    _step_supports_amp_scaling = True
    """A GradScaler then calls ``step`` at once, which refuses, and not only where a gradient is finite."""

    def __init__(
        self,
        model: PreTrainedModel,
        lr: float,
        micro_batches: int = 1,
        rule: str | VoteRule | None = None,
        weight_decay: float = 0.0,
        seed: int = 0,
        betas: tuple[float, float] = (0.9, 0.99),
    ) -> None:
        """
        Args:
            model: with ghost modules, on its device; all its grids are unlocked (mutated).
            lr: of the size that suits AdamW; 0.25 / hidden size is the suite's own default.
            micro_batches: the trainer's ``gradient_accumulation_steps``.
            rule: a vote rule or its name; by default what goes with the model's manifold.
            weight_decay: of the grids, as AdamW's.
            seed: of the votes' random draws.
            betas: of norms and biases.

        Raises:
            ValueError: a model without grids, or a number out of range.
            RuleError: a rule that does not go with the manifold or the number of micro-batches.
        """
        self.grids = grids_of(model)
        if not self.grids:
            raise ValueError("the model has no grids: open a prime-hf folder with from_pretrained, or a PRIME .pt file")
        if micro_batches < 1 or not 0 <= weight_decay * lr <= 2**-10:
            raise ValueError(
                f"micro_batches is {micro_batches}, expected at least 1, and weight_decay {weight_decay}, expected 0 "
                f"to {2**-10 / max(lr, 2**-10):g}"
            )
        if rule is None:
            rule = "compact" if next(iter(self.grids.values())).manifold.vote_bits else "momentum"
        self.vote_decay = weight_decay
        self.micro_batches = micro_batches
        self.ballot = Ballot(seed=seed, rule=rule if isinstance(rule, VoteRule) else rule_named(rule))
        self.moved: dict[str, Movement] = {}
        self._begin_step()
        name_grids(model, self.ballot)
        for grid in self.grids.values():
            self.ballot.rule.check(grid.tables(), micro_batches, grid.uses)
            # Another optimizer of this model may have left its votes, in units of its own.
            grid.lock()
            grid.unlock()
        super().__init__(model.parameters(), lr=lr, betas=betas, weight_decay=0.0)
        model.register_forward_pre_hook(partial(_begin_micro_batch, weakref.ref(self), weakref.ref(model)))

    def _begin_step(self) -> None:
        """Nothing is counted yet: micro-batches, those of them that voted; nor seen: measuring, what is not finite."""
        self._count = self._voted = 0
        self._measured = self._not_finite = False

    def listens(self) -> bool:
        """Whether the model's grids vote on this optimizer's ballot: another one takes them over."""
        return all(grid.ballot is self.ballot for grid in self.grids.values())

    def _begin(self, model: torch.nn.Module, _: Any) -> None:
        """Open the ballot for the micro-batch whose forward pass begins."""
        if not torch.is_grad_enabled():
            # Somebody looks at the model between a forward pass and its backward pass: no business of the ballot.
            return
        self._count_votes()
        if not model.training:
            self.ballot.close()
            return
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if distributed and torch.distributed.get_world_size() > 1:
            raise RuntimeError("PrimeVoteOptimizer does not sum votes over processes: run one process")
        if self._count == self.micro_batches:
            raise RuntimeError(
                f"a step was to have {self.micro_batches} micro-batches and another begins: make PrimeVoteOptimizer's "
                "micro_batches the trainer's gradient_accumulation_steps"
            )
        step = self.ballot.step
        # A grid that never gets a gradient would otherwise cost all others a micro-batch of every step.
        measure = self._count == 0 and step & (step - 1) == 0 and any(g.waiting for g in self.grids.values())
        self.ballot.open("measure" if measure else "cast", step, self._count, self.micro_batches)

    def _count_votes(self) -> None:
        """Take note of what the backward pass since the last forward pass has left."""
        ballot = self.ballot
        heard = bool(ballot.standing)
        self._not_finite |= bool(ballot.non_finite)
        if ballot.mode == "measure":
            self._measured = True
            waiting = [grid for grid in self.grids.values() if grid.waiting]
            for grid in waiting:
                grid.finish_measuring()
            heard = not all(grid.waiting for grid in waiting)
        if ballot.mode in ("measure", "cast") and heard:
            self._count += 1
            self._voted += ballot.mode == "cast"
        ballot.standing.clear()
        ballot.non_finite.clear()

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Move the weights by their votes and the float parameters by their gradients; ``moved`` says how far.

        Raises:
            RuntimeError: a GradScaler called; or norms and biases have gradients and no weight voted.
        """
        if hasattr(self, "found_inf"):
            # It stays there: what a scaled loss has voted is of no use, another optimizer begins without it.
            raise RuntimeError("PrimeVoteOptimizer needs no GradScaler and works with none: use bf16=True or float32")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._count_votes()
        self.ballot.close()
        group = self.param_groups[0]
        gradients = [p.grad for p in group["params"] if p.grad is not None]
        finite = all(bool(torch.isfinite(g).all()) for g in gradients)
        silent = not (self._voted or self._measured or self._not_finite)
        if silent and finite and any(bool(g.any()) for g in gradients):
            self._begin_step()
            raise RuntimeError(
                "no weight voted in this step: call model.train(), and the model itself rather than model.model, "
                "before backward"
            )
        self.ballot.voted = self._voted
        self.moved = apply_votes(self.grids, float(group["lr"]), self.vote_decay) if self._voted else {}
        if finite:
            super().step()
        else:
            log.warning("step %d: a gradient of norms or biases is not finite; they do not move", self.ballot.step)
        self.ballot.step += 1
        self._begin_step()
        return loss

    def _settings(self) -> dict[str, Any]:
        rule, seed = self.ballot.rule, self.ballot.seed
        settings = {"seed": seed, "micro_batches": self.micro_batches, "weight_decay": self.vote_decay}
        return {"rule": rule.name, **asdict(rule), **settings}

    def state_dict(self) -> dict[str, Any]:
        """AdamW's, and under ``prime`` the step, the settings and every grid's votes and row state (by reference)."""
        votes = {name: grid.vote_state() for name, grid in self.grids.items()}
        return {**super().state_dict(), "prime": {**self._settings(), "step": self.ballot.step, "votes": votes}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict` (copied).

        Raises:
            ValueError: no votes in it, or those of another rule, weight decay, seed, number of micro-batches or model.
        """
        state = dict(state_dict)
        prime = state.pop("prime", None)
        if prime is None:
            raise ValueError("the optimizer state has no votes: it is not PrimeVoteOptimizer's")
        for name, own in self._settings().items():
            # States of before all of them were kept lack some.
            if prime.get(name, own) != own:
                raise ValueError(f"the optimizer state has {name} {prime[name]}, this optimizer {own}")
        if set(prime["votes"]) != set(self.grids):
            raise ValueError("the optimizer state has the votes of another model")
        super().load_state_dict(state)
        self.ballot.step = int(prime["step"])
        self._begin_step()
        for name, grid in self.grids.items():
            given, present = prime["votes"][name], grid.vote_state()
            if given.get("votes") is None or given["votes"] is not present.get("votes"):
                grid.load_vote_state(given)
