"""What becomes of the sequences of a step that ran: how far they are, what they say, and whether they end by it.

Imports no torch.
"""

from swaplora_server.engine.request import FinishReason, Logprobs, Sequence, TokenEvent, Vector
from swaplora_server.engine.sampling.constraint import ConstraintPendingError
from swaplora_server.engine.scheduling.batch import Sampled, ScheduledRows
from swaplora_server.engine.scheduling.live import Live
from swaplora_server.engine.scheduling.waiting_line import GENERATED_WEIGHT
from swaplora_server.kernels.step import Wants


class Outcomes:
    """Takes in what the model said. With `appends_forced` tokens that alone may come next need no step."""

    def __init__(self, live: Live, *, appends_forced: bool) -> None:
        self._live = live
        self._appends_forced = appends_forced

    def commit(self, rows: ScheduledRows, sampled: Sampled | None) -> None:
        """Record that `rows` ran, unless their request has ended since, as where a sibling failed."""
        sequence = rows.sequence
        if not sequence.block_table:
            return
        is_pending = sampled is not None and isinstance(sampled.error, ConstraintPendingError)
        stop = rows.stop - is_pending  # its last row is run again
        sequence.num_computed = stop
        self._live.cache.publish(sequence, rows.start, stop)
        if sampled is not None and sampled.scores is None:
            self._fail_not_finite(sequence)
            return
        if sampled is not None and sampled.scores:
            sequence.request.scores += sampled.scores
        if is_pending:
            return
        if sampled is not None and rows.is_sampling:
            self._append(sequence, sampled)
        elif sampled is not None and rows.wants is Wants.HIDDEN:
            self._finish_hidden(sequence, sampled.hidden)
        elif rows.stop == sequence.num_tokens:
            self._live.finish(sequence, TokenEvent(sequence.index, finish_reason=FinishReason.LENGTH))

    def _finish_hidden(self, sequence: Sequence, hidden: Vector | None) -> None:
        if hidden is None:
            self._fail_not_finite(sequence)
            return
        sequence.request.hidden = hidden
        self._live.finish(sequence, TokenEvent(sequence.index, finish_reason=FinishReason.STOP))

    def _fail_not_finite(self, sequence: Sequence) -> None:
        message = "the output is not finite: the adapter's weights are too large for this prompt"
        failed = TokenEvent(sequence.index, None, None, FinishReason.ERROR, message, "adapter_failed")
        self._live.cache.disown(sequence)
        self._live.finish(sequence, failed)

    def _append(self, sequence: Sequence, sampled: Sampled) -> None:
        if sampled.error is not None:
            raise sampled.error
        if sampled.token_id is None:
            self._fail_not_finite(sequence)
            return
        goes_on = self._append_token(sequence, sampled.token_id, sampled.logprobs)
        while goes_on and self._appends_forced and (token_id := sequence.forced) is not None:
            goes_on = self._append_token(sequence, token_id)

    def _append_token(self, sequence: Sequence, token_id: int, logprobs: Logprobs | None = None) -> bool:
        """Whether it goes on after that token."""
        sequence.append(token_id)
        self._live.waiting.charge(sequence, 1, GENERATED_WEIGHT)
        reason = sequence.finish_reason_after(token_id)
        event = TokenEvent(sequence.index, token_id, logprobs, reason)
        if reason is None:
            sequence.request.tell(event)
        else:
            self._live.finish(sequence, event)
        return reason is None
