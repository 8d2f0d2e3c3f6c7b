"""What an engine has to do, and with what, at one moment: for metrics, health and pages. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass

from swaplora_server.kernels.step import StepForm


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Sequences, blocks of the KV cache, and counts of tokens and requests, which only grow."""

    num_running: int  # sequences in the batch
    num_waiting: int  # sequences and commands in the queue
    num_blocks: int
    num_free_blocks: int
    num_cached_blocks: int  # that later prompts can begin with
    num_looked_up_tokens: int  # of prompts, in the prefix cache
    num_hit_tokens: int  # of those, the ones that were in it
    num_failed_requests: int  # that ended alone, of a fault that was theirs
    num_preempted: int  # times that a sequence gave its blocks to another and began again
    block_size: int  # tokens
    num_steps: Mapping[StepForm, int]

    @property
    def is_at_rest(self) -> bool:
        """Whether nothing runs or waits, and every block is free."""
        return not self.num_running and not self.num_waiting and self.num_free_blocks == self.num_blocks
