"""The only training loop.

`fit(objective, …)` owns loaders, processes, precision, accumulation, clipping, the learning rate, validation, early
stopping, saving and resuming. A stage is an objective; it has no loop of its own.
"""

import math
import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from models.objectives import Objective
from utils.cells.minibatches import CellDataset, Plan, make_loader
from utils.errors import UserError
from utils.progress import epoch_name, progress_bar
from utils.train.batch_size import choose_batch_size
from utils.train.config import TrainConfig
from utils.train.distributed import Runtime
from utils.train.folders import is_there, write_folder
from utils.train.forecast import forecast
from utils.train.guards import COLLAPSED, LEAST_SPREAD, STOPPED, FiniteGuard, Spread, Stopped, StopSignal
from utils.train.lock import sole_writer
from utils.train.log import RunLog, copy_log, training_folder
from utils.train.schedule import learning_rate
from utils.train.state import Progress, load_state, saved_cut, saved_step, write_state
from utils.train.sums import Sums, add_up, means, total


def fit(
    objective: Objective,
    train: CellDataset,
    val: CellDataset,
    config: TrainConfig,
    runtime: Runtime,
    folder: Path,
    write_model: Callable[[Path], None],
    identity: dict | None = None,
) -> dict[str, float]:
    """Train an objective and keep the model with the lowest validation loss (or the last one, with --keep last).

    Parameters
    ----------
    objective : minibatch → (loss [B], metrics)
    train, val : cells; without validation cells the training loss decides
    config : how to train
    runtime : this process
    folder : of the model; the training state lies beside it, in `<folder>.training`
    write_model : writes the model's files into an empty folder
    identity : what makes this run another than others beside `config`: the script's flags, the parents' hashes

    Returns
    -------
    The kept epoch's metrics

    Raises
    ------
    UserError
        If a model of that name exists, or is being written by another run, if resuming does not fit, or if no loss is
        finite.
    Stopped
        If Ctrl-C, SIGTERM or SIGUSR1 asked for it; the state is saved first.
    """
    with sole_writer(folder, runtime):
        return _fit(objective, train, val, config, runtime, folder, write_model, identity)


def _fit(objective, train, val, config, runtime, folder, write_model, identity) -> dict[str, float]:
    """`fit`, once the folder is ours to write."""
    state_folder = training_folder(folder) / "state"
    objective.to(runtime.device)
    optimizer = torch.optim.AdamW(
        decayed_groups(objective, config.weight_decay),
        lr=config.learning_rate,
        eps=config.adam_epsilon,
        fused=True,
        betas=(0.9, 0.999),
    )
    progress, best_metrics = Progress(), {}
    resume = not starts_anew(folder, config, runtime)
    if config.batch_size is None:
        cut = saved_cut(state_folder) if resume else None
        config = replace(config, **cut) if cut else choose_batch_size(objective, train, config, runtime)
    identity = (identity or {}) | asdict(config) | {"cells": train.fingerprint}
    for rank, cells in enumerate(runtime.gather(identity["cells"])):
        if cells != identity["cells"]:
            raise UserError(f"process {rank} has read other training cells than process {runtime.rank}; use one file")
    if resume:
        progress, best_metrics = load_state(state_folder, objective, optimizer, identity)
        config = keep_step_size(config, progress.step_size, runtime)
        runtime.say(f"resuming {folder.name} at epoch {progress.epoch + 1}, optimiser step {progress.step}")
    with StopSignal() as stop:
        runtime.barrier()  # nobody writes before everybody has looked
        if runtime.is_main and not resume:
            shutil.rmtree(training_folder(folder), ignore_errors=True)
        log = RunLog(training_folder(folder), runtime.is_main, progress.step)

        share = {"rank": runtime.rank, "world_size": runtime.world_size}
        plan = Plan(train.lengths, config.batch_size, config.grad_acc, seed=config.seed, shuffle=True, **share)
        progress.step_size = plan.step_size
        val_plan = Plan(val.lengths, config.batch_size, config.grad_acc, **share)
        forward = lambda batch: run(objective, batch, config, runtime)
        expected = forecast(objective, forward, train, plan, val_plan, config, progress.step)
        module = objective
        if runtime.world_size > 1:
            module = share_gradients(objective, train[next(iter(plan))], config, runtime)

        def save_state(sums: Sums) -> None:
            progress.sums = total(sums, runtime)
            if runtime.is_main:
                write_folder(
                    state_folder,
                    lambda path: write_state(path, objective, optimizer, identity, progress, best_metrics),
                )

        def goes_on() -> bool:
            out_of_patience = config.patience and progress.epochs_since_best >= config.patience
            out_of_steps = config.max_steps and progress.step >= config.max_steps
            return progress.epoch < config.epochs and not out_of_patience and not out_of_steps

        if not resume:
            save_state({})  # so that there is something to resume from the first moment on
        n_parameters = sum(p.numel() for p in objective.parameters())
        n_trained = sum(p.numel() for p in objective.parameters() if p.requires_grad)
        runtime.say(
            f"{folder.name}: {len(train):,} training and {len(val):,} validation cells, {n_parameters:,} parameters "
            f"({n_trained:,} trained), {runtime.world_size} × {runtime.device}\n  {expected}"
        )
        guard = FiniteGuard(train.barcodes)
        while goes_on():
            plan.epoch, plan.first_step = progress.epoch, progress.step_in_epoch
            loader = make_loader(train, plan, runtime.device)
            sums, speed = train_epoch(
                module, optimizer, loader, plan, progress, config, runtime, save_state, guard, stop
            )
            metrics = {"loss": math.inf} | means(sums, runtime)  # no loss at all if every step was left out
            metrics |= {"skipped": progress.skipped} if progress.skipped else {}
            at_end = progress.step_in_epoch == plan.n_steps
            done = progress.epoch + progress.step_in_epoch / plan.n_steps
            log.add("train", done, progress.step, metrics | speed)
            is_due, is_best = (progress.epoch + 1) % config.val_every == 0, False
            is_last = progress.epoch + 1 >= config.epochs or 0 < config.max_steps <= progress.step
            looks = is_due or is_last or not at_end
            if looks:
                if len(val):
                    metrics = evaluate(objective, make_loader(val, val_plan, runtime.device), config, runtime)
                    log.add("val", done, progress.step, metrics)
                    if metrics.get("spread", 1.0) < LEAST_SPREAD:
                        runtime.say(COLLAPSED.format(metrics["spread"]))
                found = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
                runtime.say(f"  {epoch_name(done)}: {found}")
                is_best = metrics["loss"] < progress.best
                if is_best or (config.keep == "last" and math.isfinite(metrics["loss"])):
                    best_metrics = {"epoch": done} | metrics
                    if runtime.is_main:
                        write_folder(folder, write_model)
            # A look that only the end of a run asks for leaves no trace in its resumption.
            if at_end:
                progress.epoch, progress.step_in_epoch, progress.sums, sums = progress.epoch + 1, 0, {}, {}
                if is_due:
                    progress.epochs_since_best = 0 if is_best else progress.epochs_since_best + config.val_every
                    progress.best = min(progress.best, metrics["loss"])
            stops = goes_on() and runtime.any(bool(stop.name))[0]
            if looks or stops or progress.step % config.save_steps < plan.n_steps:
                save_state(sums)
            if stops:
                stop_here(progress, stop, runtime)
        if not best_metrics:
            raise UserError(
                f"{folder}: no epoch ended with a finite loss; lower --learning_rate or use --precision fp32"
            )
        if runtime.is_main:
            log.close(folder.name, objective.loss_name, best_metrics["epoch"], config.keep)
            copy_log(folder)
            kept = "".join(f", {name} {value:.4g}" for name, value in best_metrics.items() if name != "epoch")
            runtime.say(f"saved {folder}: {epoch_name(best_metrics['epoch'])}, the {config.keep}{kept}")
        runtime.barrier()
        return best_metrics


def starts_anew(folder: Path, config: TrainConfig, runtime: Runtime) -> bool:
    """Whether `fit` will begin at the first step, and not where an earlier run has stopped.

    Raises
    ------
    UserError
        If it may not, as a model of that name exists, or the training state of a run that has taken a step.
    """
    state_folder = training_folder(folder) / "state"
    if config.resume or (runtime.restarted and is_there(state_folder)):
        return False
    if config.overwrite or runtime.restarted:
        return True
    if is_there(folder):
        raise UserError(f"{folder}: exists already; add --resume, --overwrite, or choose another --model_name")
    step = saved_step(state_folder)
    if step != 0:
        what = "a training state that cannot be read" if step is None else f"a run that has reached step {step}"
        raise UserError(
            f"{state_folder}: holds {what}; add --resume to go on, --overwrite to start anew, or choose another "
            "--model_name"
        )
    return True


def decayed_groups(objective: Objective, weight_decay: float) -> list[dict]:
    """The objective's parameter groups, each cut into matrices, which decay, and biases and norms, which do not."""
    groups = []
    for group in objective.parameter_groups():
        for is_matrix in (True, False):
            params = [p for p in group["params"] if (p.ndim > 1) == is_matrix]
            groups += [group | {"params": params, "weight_decay": weight_decay * is_matrix}] if params else []
    return groups


def share_gradients(objective: Objective, batch, config: TrainConfig, runtime: Runtime) -> nn.Module:
    """The objective such that its gradients are averaged over the processes.

    DistributedDataParallel lays out its buckets anew after its first pass, and adds gradients up in another order from
    then on. That pass is one for nothing, of the first cells of the first epoch: a resumed run then adds up as the
    uninterrupted one did.
    """
    ids = [runtime.device.index] if runtime.device.type == "cuda" else None
    module = DistributedDataParallel(objective, device_ids=ids, forward_sync_buffers=False)
    loss, _ = run(module.train(), batch, config, runtime)
    loss.sum().backward()
    module.zero_grad(set_to_none=True)
    return module


def keep_step_size(config: TrainConfig, step_size: int, runtime: Runtime) -> TrainConfig:
    """The same cells per optimiser step from another number of processes, in micro-batches of at most the same size."""
    if step_size == config.batch_size * config.grad_acc * runtime.world_size:
        return config
    share, rest = divmod(step_size, runtime.world_size)
    if rest:
        raise UserError(
            f"--resume: the run has {step_size} cells per step, which {runtime.world_size} processes cannot share "
            "evenly; start a number of processes that divides it"
        )
    batch_size = max(size for size in range(1, min(share, config.batch_size) + 1) if share % size == 0)
    runtime.say(
        f"{runtime.world_size} processes take micro-batches of {batch_size}: {step_size} cells per step, as before"
    )
    return replace(config, batch_size=batch_size, grad_acc=share // batch_size)


def stop_here(progress: Progress, stop: StopSignal, runtime: Runtime) -> None:
    """End the run, whose state is saved, with an exit code of its own."""
    runtime.say(f"stopped by {stop.name or 'a signal'} after step {progress.step}; go on with --resume")
    raise Stopped(STOPPED)


def train_epoch(
    module, optimizer, loader, plan, progress, config, runtime, save_state, guard, stop
) -> tuple[Sums, dict[str, float]]:
    """Optimiser steps from where `progress` stands to the end of the epoch (or to --max_steps).

    Returns
    -------
    This process's sums of the metrics (those from before a resumption are the first process's), and the speed
    """
    objective = module.module if isinstance(module, DistributedDataParallel) else module
    objective.train()
    # Every process begins with the same metrics; those from before a resumption count once.
    sums = {name: list(pair) if runtime.is_main else [0.0, 0.0] for name, pair in progress.sums.items()}
    started = time.monotonic()
    bar = progress_bar(
        len(plan.lengths),
        f"epoch {plan.epoch + 1}/{config.epochs}",
        initial=plan.first_step * plan.step_size,
        shown=runtime.is_main,
    )
    rate, cells_done, step_sums = 0.0, 0, {}
    for i, batch in enumerate(loader):
        micro = i % config.grad_acc
        if micro == 0:
            objective.before_step(progress.step)
            rate = learning_rate(
                plan.epoch + progress.step_in_epoch / plan.n_steps,
                config.learning_rate,
                config.warmup_epochs,
                config.cycle_epochs,
            )
            step_sums = {}
        is_last = micro == config.grad_acc - 1
        waits = nullcontext() if is_last or runtime.world_size == 1 else module.no_sync()
        with waits:
            loss, metrics = run(module, batch, config, runtime)
            # Processes' gradients are averaged, but cells are to be: hence × world_size.
            (loss.sum() / batch.step_cells * runtime.world_size).backward()
        guard.note(batch.row, loss)
        add_up(step_sums, metrics | {"loss": (loss.detach().sum(), batch.weight.sum())})
        if not is_last:
            continue
        norm = nn.utils.clip_grad_norm_(
            [p for g in optimizer.param_groups for p in g["params"]], config.clip_norm or math.inf
        )
        is_finite = math.isfinite(norm) and math.isfinite(step_sums["loss"][0])
        is_bad, stopping = runtime.any(not is_finite, bool(stop.name))
        if guard.passes(not is_bad, progress.step, runtime):
            for group in optimizer.param_groups:
                group["lr"] = rate * group["scale"]
            optimizer.step()
            add_up(sums, step_sums)
        else:
            progress.skipped += 1
        optimizer.zero_grad(set_to_none=True)
        progress.step, progress.step_in_epoch = progress.step + 1, progress.step_in_epoch + 1
        cells_done += batch.step_cells
        if "loss" in sums:
            bar.set_postfix(loss=f"{sums['loss'][0] / max(sums['loss'][1], 1):.4f}", refresh=False)
        bar.update(batch.step_cells)
        if config.max_steps and progress.step >= config.max_steps:
            break
        at_end = progress.step_in_epoch == plan.n_steps
        if not at_end and (stopping or progress.step % config.save_steps == 0):
            save_state(sums)
        if stopping and not at_end:
            bar.close()
            stop_here(progress, stop, runtime)
    bar.close()
    seconds = time.monotonic() - started
    return sums, {
        "learning_rate": rate,
        "seconds": round(seconds, 3),
        "cells_per_second": round(cells_done / seconds, 2),
    }


@torch.no_grad()
def evaluate(objective: Objective, loader, config: TrainConfig, runtime: Runtime) -> dict[str, float]:
    """Mean metrics over a loader's cells and all processes, without dropout."""
    objective.eval()
    sums, spread = {}, Spread()
    for batch in loader:
        loss, metrics = run(objective, batch, config, runtime)
        add_up(sums, metrics | {"loss": (loss.sum(), batch.weight.sum())})
        spread.add(objective.embedding, batch.weight)
    deviation = spread.deviation(runtime)
    return means(sums, runtime) | ({} if deviation is None else {"spread": deviation})


def run(module: nn.Module, batch, config: TrainConfig, runtime: Runtime):
    """Forward pass: weighted loss [B] (0 for filling) and metrics."""
    batch = batch.to(runtime.device)
    with torch.autocast(runtime.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
        loss, metrics = module(batch)
    return loss * batch.weight, metrics
