"""The training run, from a config to an exit code."""

import fcntl
import functools
import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from nemomodel.checkpoint.checkpoints import Checkpoints, Progress
from nemomodel.checkpoint.huggingface.side_files import carry_over
from nemomodel.checkpoint.state import Engine
from nemomodel.checkpoint.weights import load_weights
from nemomodel.config.load import ConfigError, config_to_dict
from nemomodel.config.pattern import LayerKind
from nemomodel.config.precision import phases
from nemomodel.config.schema import Config
from nemomodel.data.batch import TokenData, open_data
from nemomodel.data.token_bytes import token_bytes
from nemomodel.model.count import describe, parameter_shapes
from nemomodel.model.init import initialize
from nemomodel.model.nemotron import DTYPES, Nemotron
from nemomodel.model.quantize import LAYERS, Quantization, formats
from nemomodel.model.stages import cut_stages
from nemomodel.observe.environment import write_run_files
from nemomodel.observe.logs import setup_logging
from nemomodel.observe.peak import Peak, peak_flops
from nemomodel.observe.sinks import Sink, check_backends, open_sinks, write_metrics
from nemomodel.ops import backend
from nemomodel.ops.fused import use_compiler
from nemomodel.parallel.mcore import Ranks, start_ranks, stop_ranks, wrap_ddp
from nemomodel.parallel.optimizer import build_optimizer, build_scheduler
from nemomodel.quant.compiled import WORTH_A_CALL
from nemomodel.quant.selftest import FEW, MANY, self_test, self_test_layers
from nemomodel.quant.statistics import Observer
from nemomodel.quant.transformer_engine_recipe import require
from nemomodel.train.faults import EXIT_INTERRUPTED, NotFiniteError, StopRequest, stop_request
from nemomodel.train.meter import Meter, expert_loads, losses_per_token
from nemomodel.train.step import DeviceBatch, count_targets, forward_backward, update
from nemomodel.train.validate import validate

log = logging.getLogger(__name__)


def run(config: Config) -> int:
    """Train as `config` says, from the newest checkpoint of run.dir if there is one.

    Returns:
        0 when the last step (or train.stop_after) is done, EXIT_INTERRUPTED after a signal.

    Raises:
        ConfigError: before anything is written but the run folder.
        SelfTestError: the quantiser of the device is wrong; nothing was started.
        DataError, CheckpointError, NotFiniteError: the published checkpoints are intact.
    """
    _check_packages(config)
    if config.run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
        torch.use_deterministic_algorithms(True)
    ranks = start_ranks(config)
    setup_logging(ranks.rank)
    use_compiler(config.train.compile)
    try:
        with stop_request() as request:
            _check_quantizer(config, ranks)
            data = open_data(
                config.data,
                train=config.train,
                vocab_size=config.model.vocab_size,
                seed=config.run.seed,
            )
            with _run_folder(config, ranks):
                return _run(config, ranks, data, request)
    finally:
        stop_ranks()


def _run(config: Config, ranks: Ranks, data: TokenData, request: StopRequest) -> int:
    engine = build_engine(config, ranks)
    checkpoints = Checkpoints(config, ranks, engine)
    progress = checkpoints.load() or _start(config, ranks, engine)
    if progress.step > config.train.steps:
        raise ConfigError(
            f"train.steps={config.train.steps}: {checkpoints.latest()} is further already; "
            f"use at least {progress.step}, or another run.dir"
        )
    if ranks.rank == 0:  # after the checkpoint has been found to fit this config
        write_run_files(
            Path(config.run.dir), config=config_to_dict(config), tokenizer=data.tokenizer
        )
    # Measured on a CPU, so once: the log names the number that MFU is computed with.
    peak = peak_flops(ranks.device, DTYPES[config.precision.weights])
    _announce(config, ranks, data, progress, peak, engine.quantization)
    sinks = open_sinks(
        config.observe,
        Path(config.run.dir),
        rank=ranks.rank,
        num_steps=config.train.steps,
        start_step=progress.step,
        config=config_to_dict(config),
    )
    try:
        return _train(config, ranks, data, engine, checkpoints, progress, sinks, request, peak)
    finally:
        for sink in sinks:
            sink.close()


def _start(config: Config, ranks: Ranks, engine: Engine) -> Progress:
    """Before the first step: with initial weights, or those of another run or model."""
    if source := config.checkpoint.init_from:
        for chunk in engine.chunks:
            log.info("weights from %s", load_weights(source, chunk.module))
        engine.optimizer.reload_model_params()  # its FP32 copies
        if ranks.rank == 0:
            carry_over(source, Path(config.run.dir))
    return Progress(step=0, tokens=0)


def build_engine(config: Config, ranks: Ranks) -> Engine:
    """The model with initial weights, data parallel, and its optimizer and schedule."""
    with ranks.device:
        models = [
            Nemotron(
                config.model,
                dtype=DTYPES[config.precision.weights],
                recompute=frozenset(LayerKind[name.upper()] for name in config.train.recompute),
                mesh=ranks.mesh,
                stage=stage,
            )
            for stage in cut_stages(config)[ranks.mesh.pp.rank :: ranks.mesh.pp.size]
        ]
    for model in models:
        initialize(model, seed=config.run.seed)
    try:
        quantization = Quantization(
            models, phases(config), seed=config.run.seed, executor=config.precision.executor
        )
    except ValueError as error:
        raise ConfigError(f"parallel: {error}") from None
    chunks = [wrap_ddp(model, config, ranks) for model in models]
    optimizer = build_optimizer(chunks, config, ranks)
    return Engine(chunks, optimizer, build_scheduler(optimizer, config), quantization)


def _train(
    config: Config,
    ranks: Ranks,
    data: TokenData,
    engine: Engine,
    checkpoints: Checkpoints,
    progress: Progress,
    sinks: list[Sink],
    request: StopRequest,
    peak: Peak,
) -> int:
    train, interval = config.train, config.checkpoint.interval
    # A run that is already further stays where it is: its weights are not those of stop_after.
    last = max(train.stop_after or train.steps, progress.step)
    step_tokens, tokens = train.global_batch_size * train.seq_length, progress.tokens
    bytes_V = None
    if data.has_validation and data.tokenizer is not None:
        bytes_V = token_bytes(data.tokenizer, vocab_size=config.model.vocab_size)
    meter = Meter(
        flops_per_token=describe(config)["flops_per_token"]["training"],
        peak_flops=peak.flops * ranks.world_size,
        device=ranks.device,
    )
    quantization = engine.quantization
    sampling = config.observe.quantization_interval
    observer = Observer(quantization.roles, ranks.device) if sampling else None
    saved = progress.step
    exit_code = 0

    for step in range(progress.step + 1, last + 1):
        micro_batches = data.batch(step - 1, dp_rank=ranks.dp_rank, dp_size=ranks.dp_size)
        batches = [DeviceBatch.of(batch, ranks.device) for batch in micro_batches]
        num_targets, stop = count_targets(batches, engine, ranks, stop=request.signal is not None)
        if stop:
            last, exit_code = step - 1, EXIT_INTERRUPTED
            break
        if (phase := quantization.phase(step)).first_step == step > 1:
            log.info("step %d begins a precision phase: %s", step, phase)
        lr = engine.optimizer.param_groups[0]["lr"]
        quantization.observer = observer if sampling and step % sampling == 0 else None
        with meter.computing():
            losses = forward_backward(
                batches,
                engine,
                ranks,
                num_targets=num_targets,
                num_sequences=train.global_batch_size,
                step=step,
            )
            try:
                grad_norm, count = update(losses, engine, step=step)
            except NotFiniteError:
                checkpoints.finish()  # one that is still being written is from before this step
                raise
        meter.step_done(step_tokens)
        tokens += step_tokens

        values: dict[str, float] = {}
        if quantization.observer is not None:
            values |= quantization.observer.read()
            quantization.observer = None
        if step % config.observe.log_interval == 0 or step in (1, train.steps):
            values |= losses_per_token(losses, num_targets, ranks)
            values |= {"optim/grad_norm": grad_norm, "optim/lr": lr}
            values |= expert_loads(config.model, count)
            values |= {"data/tokens": tokens, **meter.read()}
        if data.has_validation and _due(step, train.validation_interval, train.steps):
            with meter.paused():
                pieces = data.validation(
                    dp_rank=ranks.dp_rank,
                    dp_size=ranks.dp_size,
                    multiple=ranks.mesh.pp.size if len(engine.chunks) > 1 else 1,
                )
                quantization.begin_validation(step)
                values |= validate(engine, pieces, ranks, token_bytes=bytes_V)
        if values:
            write_metrics(sinks, step, values)
        checkpoints.poll()
        if interval and step % interval == 0:
            checkpoints.save(step, tokens=tokens)
            saved = step

    if saved != last:
        checkpoints.save(last, tokens=tokens)
    checkpoints.finish()
    log.info("stopped after step %d of %d; checkpoint %s", last, train.steps, checkpoints.latest())
    return exit_code


def _due(step: int, interval: int | None, last: int) -> bool:
    return step == last or (interval is not None and step % interval == 0)


def _check_packages(config: Config) -> None:
    try:
        check_backends(config.observe)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _check_quantizer(config: Config, ranks: Ranks) -> None:
    """Whether this machine quantises as the recipes say."""
    if not (used := formats(config)):
        return
    executor, train = config.precision.executor, config.train
    tokens = train.micro_batch_size * train.seq_length
    matrices = [shape for shape in parameter_shapes(config.model).values() if len(shape) > 1]
    largest = max(max(math.prod(shape), tokens * max(shape[-2:])) for shape in matrices)
    draws = MANY if largest >= WORTH_A_CALL else FEW
    if executor == "transformer_engine":
        try:
            require(used, environment=os.environ)
        except ValueError as error:
            raise ConfigError(str(error)) from None
    else:
        self_test(ranks.device, draws=draws)
    make = functools.partial(LAYERS[executor], name="self-test", seed=config.run.seed)
    self_test_layers(make, used, ranks.device, draws=draws)
    log.info("self-test of the quantiser on %s, %s: passed", ranks.device, executor)


@contextmanager
def _run_folder(config: Config, ranks: Ranks) -> Iterator[None]:
    """Make run.dir, and keep other runs out of it until the block ends."""
    if ranks.rank != 0:
        yield
        return
    folder = Path(config.run.dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "run.lock").open("w")
    except OSError as error:
        raise ConfigError(f"run.dir={config.run.dir!r}: {error.strerror}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"run.dir={config.run.dir!r}: another run is at work there; "
                "wait for it, or use another folder"
            ) from None
        yield


def _announce(
    config: Config,
    ranks: Ranks,
    data: TokenData,
    progress: Progress,
    peak: Peak,
    quantization: Quantization,
) -> None:
    """What will run, one fact per line."""
    counts = describe(config)
    log.info(
        "model: %s parameters, %s active, layers %s",
        f"{counts['parameters_total']:,}",
        f"{counts['parameters_active']:,}",
        config.model.layer_pattern,
    )
    log.info(
        "device: %s, %d rank(s), peak %.3g FLOP/s each (%s)",
        ranks.device.type,
        ranks.world_size,
        peak.flops,
        peak.source,
    )
    for phase in phases(config):
        log.info("step %d on: %s", phase.first_step, phase)
        for line in quantization.describe(phase):
            log.info("  %s", line)
    for line in (*backend.describe(ranks.device), *data.describe()):
        log.info(line)
    if progress.step:
        log.info("resuming after step %d of %d", progress.step, config.train.steps)
