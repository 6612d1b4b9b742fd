"""The training loop, shared by all stages.

`fit` owns everything that is not specific to a stage: data loading, several processes, precision, gradient accumulation
and clipping, the learning rate, validation, early stopping, saving and resuming. A stage only defines its objective.

    fit                 one run: prepare or resume it, then epoch after epoch until it ends
      train_epoch       the optimiser steps of one epoch
        run             one forward pass; the same for training, validation and time measurements
      evaluate          metrics of the validation cells
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
from utils.train.batch_size import check_weights_fit, choose_batch_size, weights_memory
from utils.train.config import TrainConfig
from utils.train.distributed import Runtime
from utils.train.folders import write_folder
from utils.train.forecast import forecast
from utils.train.guards import COLLAPSED, LEAST_SPREAD, STOPPED, FiniteGuard, Spread, Stopped, StopSignal
from utils.train.lock import sole_writer
from utils.train.log import RunLog, copy_log, training_folder
from utils.train.schedule import learning_rate
from utils.train.state import Progress, keep_step_size, load_state, saved_batch_size, starts_anew, write_state
from utils.train.sums import Sums, add_up, means, read_together, total

READ_EVERY = 32
"""Minibatches of an evaluation between two transfers of results from the device."""


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
    """Train an objective and save the model with the lowest validation loss (or the last one, with --keep last).

    Parameters
    ----------
    objective : minibatch → (loss [B], metrics)
    train, val : training and validation cells; without validation cells, the training loss chooses the model
    config : training settings
    runtime : this process among all processes of the run
    folder : the model folder to write; the training state lies beside it, in `<folder>.training`
    write_model : writes the model's files into an empty folder
    identity : settings that, together with `config`, identify the run: the script's flags and the hashes of the parent
        models. A resumed run must have the same ones

    Returns
    -------
    Metrics of the epoch whose model was saved

    Raises
    ------
    UserError
        If the model folder exists, if another run writes it, if the saved state belongs to a different run, or if no
        epoch has a finite loss.
    Stopped
        If Ctrl-C, SIGTERM or SIGUSR1 stopped the run; its state has been saved.
    """
    with sole_writer(folder, runtime):
        return _fit(objective, train, val, config, runtime, folder, write_model, identity)


def _fit(objective, train, val, config, runtime, folder, write_model, identity) -> dict[str, float]:
    """Do the work of `fit`, while this run holds the lock of the folder."""
    state_folder = training_folder(folder) / "state"
    check_weights_fit(objective, runtime.device)
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
    if config.batch_size is None:  # --batch_size auto: as the interrupted run chose, or measured now
        chosen = saved_batch_size(state_folder) if resume else None
        config = replace(config, **chosen) if chosen else choose_batch_size(objective, train, config, runtime)
    # What a resumed run must have in common with the interrupted one; and so must all processes of a run.
    identity = (identity or {}) | asdict(config) | {"cells": train.fingerprint}
    for rank, cells in enumerate(runtime.gather(identity["cells"])):
        if cells != identity["cells"]:
            raise UserError(
                f"processes {rank} and {runtime.rank} have read different training cells; use the same file"
            )
    if resume:
        progress, best_metrics = load_state(state_folder, objective, optimizer, identity)
        config = keep_step_size(config, progress.step_size, runtime)
        runtime.say(f"resuming {folder.name} at epoch {progress.epoch + 1}, optimiser step {progress.step}")
    with StopSignal() as stop:
        runtime.barrier()  # the folders below are written only after every process has checked them
        if runtime.is_main and not resume:
            shutil.rmtree(training_folder(folder), ignore_errors=True)
        log = RunLog(training_folder(folder), runtime.is_main, progress.step)

        process = {"rank": runtime.rank, "world_size": runtime.world_size}
        plan = Plan(train.lengths, config.batch_size, config.grad_acc, seed=config.seed, shuffle=True, **process)
        progress.step_size = plan.step_size
        val_plan = Plan(val.lengths, config.batch_size, config.grad_acc, **process)
        # The forecast measures the bare objective, without exchange of gradients: an exchange would wait for all
        # processes, but they may measure different numbers of passes.
        forward = lambda batch: run(objective, batch, config, runtime)
        expected_time = forecast(objective, forward, train, plan, val_plan, config, progress.step)
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

        def has_more_to_do() -> bool:
            out_of_patience = config.patience and progress.epochs_since_best >= config.patience
            out_of_steps = config.max_steps and progress.step >= config.max_steps
            return progress.epoch < config.epochs and not out_of_patience and not out_of_steps

        if not resume:
            save_state({})  # a run that is killed before its first regular save can be resumed, too
        n_parameters = sum(p.numel() for p in objective.parameters())
        n_trained = sum(p.numel() for p in objective.parameters() if p.requires_grad)
        runtime.say(
            f"{folder.name}: {len(train):,} training and {len(val):,} validation cells, {n_parameters:,} parameters "
            f"({n_trained:,} trained; {weights_memory(objective) / 1e6:,.0f} MB with gradients and optimiser), "
            f"{runtime.world_size} × {runtime.device}\n  {expected_time}"
        )
        guard = FiniteGuard(train.barcodes)
        while has_more_to_do():
            plan.epoch, plan.first_step = progress.epoch, progress.step_in_epoch
            loader = make_loader(train, plan, runtime.device)
            sums, speed = train_epoch(
                module, optimizer, loader, plan, progress, config, runtime, save_state, guard, stop
            )
            metrics = {"loss": math.inf} | means(sums, runtime)  # `sums` has no loss if every step was left out
            metrics |= {"skipped": progress.skipped} if progress.skipped else {}
            is_complete = progress.step_in_epoch == plan.n_steps  # False if --max_steps was reached within the epoch
            epochs_done = progress.epoch + progress.step_in_epoch / plan.n_steps
            log.add("train", epochs_done, progress.step, metrics | speed)
            is_due, is_best = (progress.epoch + 1) % config.val_every == 0, False
            is_last = progress.epoch + 1 >= config.epochs or 0 < config.max_steps <= progress.step
            validates = is_due or is_last or not is_complete
            if validates:
                if len(val):
                    metrics = evaluate(objective, make_loader(val, val_plan, runtime.device), config, runtime)
                    log.add("val", epochs_done, progress.step, metrics)
                    if metrics.get("spread", 1.0) < LEAST_SPREAD:
                        runtime.say(COLLAPSED.format(metrics["spread"]))
                values = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
                runtime.say(f"  {epoch_name(epochs_done)}: {values}")
                is_best = metrics["loss"] < progress.best
                if is_best or (config.keep == "last" and math.isfinite(metrics["loss"])):
                    best_metrics = {"epoch": epochs_done} | metrics
                    if runtime.is_main:
                        write_folder(folder, write_model)
            # Only validations that are due by --val_every count for patience and for the best loss. Others happen
            # because the run ends here; a run that is resumed with more epochs must continue as if they had not.
            if is_complete:
                progress.epoch, progress.step_in_epoch, progress.sums, sums = progress.epoch + 1, 0, {}, {}
                if is_due:
                    progress.epochs_since_best = 0 if is_best else progress.epochs_since_best + config.val_every
                    progress.best = min(progress.best, metrics["loss"])
            is_stopping = has_more_to_do() and runtime.any(bool(stop.name))[0]
            # One of the last `n_steps` steps was a multiple of --save_steps.
            is_save_due = progress.step % config.save_steps < plan.n_steps
            if validates or is_stopping or is_save_due:
                save_state(sums)
            if is_stopping:
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
        runtime.barrier()  # no process may read the model before the first one has written it
        return best_metrics


def decayed_groups(objective: Objective, weight_decay: float) -> list[dict]:
    """Return the objective's parameter groups, split so that weight decay applies to matrices alone.

    Biases and the weights of normalisation layers are vectors and do not decay.
    """
    groups = []
    for group in objective.parameter_groups():
        for is_matrix in (True, False):
            params = [p for p in group["params"] if (p.ndim > 1) == is_matrix]
            groups += [group | {"params": params, "weight_decay": weight_decay * is_matrix}] if params else []
    return groups


def share_gradients(objective: Objective, batch, config: TrainConfig, runtime: Runtime) -> nn.Module:
    """Wrap the objective so that gradients are averaged over all processes.

    DistributedDataParallel sums gradients in buckets. After its first backward pass it regroups them, and so adds in a
    different order from then on. We run one dummy pass here and discard its gradients: every step of a run, resumed or
    not, then adds in the same order, and a resumed run ends with the same bits as an uninterrupted one.

    Parameters
    ----------
    objective : on the device of this process
    batch : any minibatch
    config, runtime : as for `fit`
    """
    ids = [runtime.device.index] if runtime.device.type == "cuda" else None
    module = DistributedDataParallel(objective, device_ids=ids, forward_sync_buffers=False)
    loss, _ = run(module.train(), batch, config, runtime)
    loss.sum().backward()
    module.zero_grad(set_to_none=True)
    return module


def stop_here(progress: Progress, stop: StopSignal, runtime: Runtime) -> None:
    """End the run after its state has been saved; the exit code tells schedulers that it can be resumed."""
    runtime.say(f"stopped by {stop.name or 'a signal'} after step {progress.step}; go on with --resume")
    raise Stopped(STOPPED)


def train_epoch(
    module, optimizer, loader, plan, progress, config, runtime, save_state, guard, stop
) -> tuple[Sums, dict[str, float]]:
    """Take the optimiser steps of one epoch, or those that are left of it after resuming or up to --max_steps.

    Parameters
    ----------
    module : the objective, wrapped by `share_gradients` if there are several processes
    optimizer, loader, plan : the optimiser, and the minibatches with the plan that orders them
    progress : position of the run; it is updated in place
    config, runtime : as for `fit`
    save_state : (sums of the metrics) → None; saves what resuming needs
    guard, stop : see `utils.train.guards`

    Returns
    -------
    Sums of the metrics of this process, and a dict with the learning rate, the seconds and the cells per second

    Raises
    ------
    UserError
        If several steps in a row have no finite loss or gradient.
    Stopped
        If the run was asked to stop; its state has been saved.
    """
    objective = module.module if isinstance(module, DistributedDataParallel) else module
    objective.train()
    # The saved sums cover all processes. After resuming, only the first process may add them to its own.
    sums = {name: list(pair) if runtime.is_main else [0.0, 0.0] for name, pair in progress.sums.items()}
    started = time.monotonic()
    bar = progress_bar(
        len(plan.lengths),
        f"epoch {plan.epoch + 1}/{config.epochs}",
        initial=plan.first_step * plan.step_size,
        shown=runtime.is_main,
    )
    rate, cells_done, passes = 0.0, 0, []
    for i, batch in enumerate(loader):
        micro = i % config.grad_acc  # micro-batch within the optimiser step
        if micro == 0:
            objective.before_step(progress.step)
            rate = learning_rate(
                plan.epoch + progress.step_in_epoch / plan.n_steps,
                config.learning_rate,
                config.warmup_epochs,
                config.cycle_epochs,
            )
            passes = []
        is_last = micro == config.grad_acc - 1
        # Gradients accumulate in each process; only the last micro-batch of a step exchanges them between processes.
        exchange = nullcontext() if is_last or runtime.world_size == 1 else module.no_sync()
        with exchange:
            loss, metrics = run(module, batch, config, runtime)
            # The loss of a step is the mean over its cells, on all processes. DistributedDataParallel divides summed
            # gradients by the number of processes, so we multiply by it.
            (loss.sum() / batch.step_cells * runtime.world_size).backward()
        passes.append((batch, loss.detach(), metrics))
        if not is_last:
            continue
        norm = nn.utils.clip_grad_norm_(
            [p for g in optimizer.param_groups for p in g["params"]], config.clip_norm or math.inf
        )
        # The one moment of a step at which the CPU waits for a GPU.
        norm, results = read_together((norm, [results for _, *results in passes]))
        step_sums = {}
        for (part, *_), (losses, metrics) in zip(passes, results, strict=True):
            guard.note(part.row, losses)
            add_up(step_sums, metrics | {"loss": (losses.sum(), part.weight.sum())})
        is_finite = math.isfinite(norm) and math.isfinite(step_sums["loss"][0])
        # All processes must skip the same steps and stop after the same step, even if only one has a reason.
        is_bad, is_stopping = runtime.any(not is_finite, bool(stop.name))
        if guard.passes(not is_bad, progress.step, runtime):
            for group in optimizer.param_groups:
                group["lr"] = rate * group["scale"]  # `scale` is the objective's: less for pretrained parts
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
        is_complete = progress.step_in_epoch == plan.n_steps
        if not is_complete and (is_stopping or progress.step % config.save_steps == 0):
            save_state(sums)
        if is_stopping and not is_complete:  # at the end of an epoch, `fit` validates first
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
    """Return the mean metrics over a loader's cells on all processes, without dropout.

    Where the objective has an embedding, `spread` is its standard deviation over cells.
    """
    objective.eval()
    sums, spread, passes = {}, Spread(), []

    def read() -> None:
        results = read_together([results for _, results in passes])
        for (batch, _), (losses, metrics, *embedding) in zip(passes, results, strict=True):
            add_up(sums, metrics | {"loss": (losses.sum(), batch.weight.sum())})
            spread.add(*(embedding or [None]), batch.weight)
        passes.clear()

    for batch in loader:
        loss, metrics = run(objective, batch, config, runtime)
        passes.append((batch, (loss, metrics) if objective.embedding is None else (loss, metrics, objective.embedding)))
        if len(passes) == READ_EVERY:
            read()
    if passes:
        read()
    deviation = spread.deviation(runtime)
    return means(sums, runtime) | ({} if deviation is None else {"spread": deviation})


def run(module: nn.Module, batch, config: TrainConfig, runtime: Runtime):
    """Run one forward pass; return the weighted loss [B] and the metrics.

    The weight of a cell is 1, or 0 where it only fills up the last minibatch of an epoch.
    """
    batch = batch.to(runtime.device)
    with torch.autocast(runtime.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
        loss, metrics = module(batch)
    return loss * batch.weight, metrics
