"""How often things fail, where an operator does not say: published figures, and what was made of them. Pure.

Llama 3 405B (The Llama 3 Herd of Models, 2024; figures as in Data Center Dynamics' account of it): 419 unexpected interruptions
in 54 days on 16,384 H100 GPUs, eight to a server. Of them 148 were faulty GPUs, 72 HBM3, 19 GPU SRAM, 17 GPU system
processors, 35 network switches and cables, 2 CPUs: hardware that makes people take a node away.
"""

from __future__ import annotations

from typing import Final

DAY_S: Final = 86_400.0
LLAMA3_DAYS: Final = 54
LLAMA3_NODES: Final = 16_384 // 8
LLAMA3_INTERRUPTIONS: Final = 419
LLAMA3_HARDWARE: Final = 148 + 72 + 19 + 17 + 35 + 2

# Each hardware fault counts as the loss of a node's memory: too many, for most leave the host up.
NODE_LOSSES_PER_NODE_DAY: Final = LLAMA3_HARDWARE / (LLAMA3_DAYS * LLAMA3_NODES)
TRAINER_FAILURES_PER_NODE_DAY: Final = (LLAMA3_INTERRUPTIONS - LLAMA3_HARDWARE) / (LLAMA3_DAYS * LLAMA3_NODES)
SOURCE: Final = (
    f"Llama 3 405B: {LLAMA3_INTERRUPTIONS} interruptions, {LLAMA3_HARDWARE} of them by hardware, in {LLAMA3_DAYS} days on "
    f"{LLAMA3_NODES} nodes of 8 GPUs"
)
