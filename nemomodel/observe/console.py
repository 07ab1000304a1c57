"""The console line of a logged step."""

import datetime
import logging
from collections.abc import Mapping

log = logging.getLogger(__name__)


class ConsoleSink:
    """One line per record, and a second one where the record has a validation loss."""

    def __init__(self, *, num_steps: int) -> None:
        self.num_steps = num_steps

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for line in console_lines(step, values, num_steps=self.num_steps):
            log.info(line)

    def close(self) -> None:
        pass


def console_lines(step: int, values: Mapping[str, float], *, num_steps: int) -> list[str]:
    """Fixed columns; a metric that the record does not have is left out."""
    head = f"step {step:>{len(str(num_steps))}}/{num_steps}"
    lines = []
    if "loss/lm" in values:
        columns = [head, *_losses(values, "loss/lm", "loss/mtp_", "loss")]
        if "optim/grad_norm" in values:
            columns.append(f"grad {values['optim/grad_norm']:8.4f}")
        if "optim/lr" in values:
            columns.append(f"lr {values['optim/lr']:.3e}")
        if "perf/tokens_per_s" in values:
            columns.append(f"{values['perf/tokens_per_s']:>9,.0f} tokens/s")
        if "perf/mfu" in values:
            columns.append(f"mfu {values['perf/mfu']:6.1%}")
        if "perf/step_s" in values:
            left = max(num_steps - step, 0) * values["perf/step_s"]
            columns.append(f"left {datetime.timedelta(seconds=round(left))}")
        lines.append("  ".join(columns))
    if "loss/validation" in values:
        columns = [head, *_losses(values, "loss/validation", "loss/validation_mtp_", "validation")]
        if "loss/validation_bits_per_byte" in values:
            columns.append(f"bits/byte {values['loss/validation_bits_per_byte']:.4f}")
        lines.append("  ".join(columns))
    return lines


def _losses(values: Mapping[str, float], main: str, mtp_prefix: str, label: str) -> list[str]:
    columns = [f"{label} {values[main]:7.4f}"]
    depths = sorted(int(n.removeprefix(mtp_prefix)) for n in values if n.startswith(mtp_prefix))
    if depths:
        mtp = " ".join(f"{values[f'{mtp_prefix}{k}']:7.4f}" for k in depths)
        columns.append(f"mtp {mtp}")
    return columns
