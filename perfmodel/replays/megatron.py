"""Megatron-LM on up to 3072 GPUs, as published, and what its activations would ask of drives.

Narayanan et al. (2021, arXiv 2104.04473), tables 1 and 2: GPT models on DGX A100 nodes with 200
Gb/s a GPU between them, sequences of 2048, a vocabulary of 51200, activations recomputed. What is
measured is the arithmetic of each GPU a second, from which steps follow by its equation 3.

SSDTrain projects from such figures what each GPU must write: at most 12.1 GB/s, and less in larger
systems. Steps without recomputing take three quarters as long here, at the same arithmetic a
second, and ranks that share maps share what lies between them too, which both came later.
"""

from __future__ import annotations

from dataclasses import dataclass

from perfmodel.cluster import accumulation_of, needed_bytes_per_s
from perfmodel.endurance import DAY_S, life_days
from perfmodel.model import Model
from perfmodel.published import layer_activation_bytes
from perfmodel.workload import Parallel, Workload

__all__ = ["LIMIT_BYTES_PER_S", "RUNS", "Run"]

LIMIT_BYTES_PER_S = 12.1e9
"""The most that any of SSDTrain's projected systems needs, of each GPU."""
RATED_BYTES = 4 * 600e12
"""Of the four drives for each GPU that SSDTrain assumes (Samsung 980 PRO, 1 TB), by their maker."""
RATED_AMPLIFICATION = 2.5
RELAXED_CYCLES = 86
"""How many times as often SSDTrain says that cells can be written which keep a value for a day in
place of three years; no drive that is sold does so."""

SEQ_LEN, VOCABULARY = 2048, 51200
_WITHOUT_RECOMPUTING = 72 / 96


@dataclass(frozen=True, kw_only=True)
class Run:
    """One row. `flops_per_s` is what was measured, of each GPU."""

    table: str
    hidden: int
    heads: int
    layers: int
    tensor: int
    pipeline: int
    gpus: int
    batch: int
    flops_per_s: float
    micro_batch: int = 1
    zero_stage: int = 0

    @property
    def data(self) -> int:
        """Ranks that have batches of their own."""
        return self.gpus // (self.tensor * self.pipeline)

    @property
    def name(self) -> str:
        """What it is called below."""
        way = "ZeRO-3" if self.zero_stage else f"t={self.tensor} p={self.pipeline}"
        return f"{self.model.num_params / 1e9:.0f}B on {self.gpus} GPUs, {way} ({self.table})"

    @property
    def model(self) -> Model:
        """The model."""
        return Model(
            num_layers=self.layers,
            hidden_size=self.hidden,
            num_heads=self.heads,
            vocab_size=VOCABULARY,
            max_positions=SEQ_LEN,
            tied=True,
            dropout=0.1,
        )

    def workload(self, *, sequence: bool = False, fused_attention: bool = False) -> Workload:
        """Return the step. How stages interleave is not published: two parts each, or all three."""
        stage = self.layers // self.pipeline
        chunks = next(count for count in (2, 3, 1) if stage % count == 0)
        parallel = Parallel(
            data=self.data,
            tensor=self.tensor,
            pipeline=self.pipeline,
            chunks=chunks if self.pipeline > 1 else 1,
            sequence=sequence and self.tensor > 1,
            zero_stage=self.zero_stage,
        )
        return Workload(
            model=self.model,
            seq_len=SEQ_LEN,
            micro_batch=self.micro_batch,
            accumulation=accumulation_of(self.batch, self.micro_batch, self.data),
            dtype="float16",
            parallel=parallel,
            framework="megatron",
            fused_attention=fused_attention,
        )

    @property
    def step_s(self) -> float:
        """Of a step that recomputes: the arithmetic of equation 3 at the measured rate."""
        per_layer = 1 + SEQ_LEN / (6 * self.hidden)
        head = VOCABULARY / (16 * self.layers * self.hidden)
        flops = 96.0 * self.batch * SEQ_LEN * self.layers * self.hidden**2 * (per_layer + head)
        return flops / (self.gpus * self.flops_per_s)

    @property
    def activation_bytes(self) -> float:
        """What each GPU would save in a step: fused attention, tensor ranks sharing all of it."""
        sequences = self.batch // self.data
        layer = layer_activation_bytes(
            SEQ_LEN,
            sequences,
            self.hidden,
            self.heads,
            self.tensor,
            sequence=self.tensor > 1,
            recompute="selective",
        )
        return layer * self.layers / self.pipeline

    @property
    def write_bytes_per_s(self) -> float:
        """What each GPU would write a second so that none of it stays."""
        return needed_bytes_per_s(self.activation_bytes, self.step_s * _WITHOUT_RECOMPUTING)

    def life_days(self, *, relaxed: bool = False) -> float:
        """Return how long four drives for each GPU last under that."""
        steps = DAY_S / (self.step_s * _WITHOUT_RECOMPUTING)
        return life_days(
            self.activation_bytes * steps,
            RATED_BYTES * (RELAXED_CYCLES if relaxed else 1),
            rated_amplification=RATED_AMPLIFICATION,
        )


# hidden, heads, layers, tensor, pipeline, GPUs, batch, teraFLOP/s a GPU
_TABLE_1 = (
    (2304, 24, 24, 1, 1, 32, 512, 137),
    (3072, 32, 30, 2, 1, 64, 512, 138),
    (4096, 32, 36, 4, 1, 128, 512, 142),
    (6144, 48, 40, 8, 1, 256, 1024, 135),
    (8192, 64, 48, 8, 2, 512, 1536, 138),
    (10240, 80, 60, 8, 4, 1024, 1792, 140),
    (12288, 96, 80, 8, 8, 1536, 2304, 148),
    (16384, 128, 96, 8, 16, 1920, 2160, 155),
    (20480, 128, 105, 8, 35, 2520, 2520, 163),
    (25600, 160, 128, 8, 64, 3072, 3072, 163),
)
_GPT_3, _MT_NLG = (12288, 96, 96), (20480, 128, 105)
# model, tensor, pipeline, GPUs, batch, teraFLOP/s, micro-batch, stage of ZeRO
_TABLE_2 = (
    (_GPT_3, 1, 1, 384, 1536, 144, 4, 3),
    (_GPT_3, 1, 1, 768, 1536, 88, 2, 3),
    (_GPT_3, 1, 1, 1536, 1536, 44, 1, 3),
    (_MT_NLG, 1, 1, 640, 2560, 138, 4, 3),
    (_MT_NLG, 1, 1, 1120, 2240, 98, 2, 3),
    (_MT_NLG, 1, 1, 2240, 2240, 48, 1, 3),
    (_GPT_3, 8, 12, 384, 1536, 153, 1, 0),
    (_GPT_3, 8, 12, 768, 1536, 149, 1, 0),
    (_GPT_3, 8, 12, 1536, 1536, 141, 1, 0),
    (_MT_NLG, 8, 35, 560, 2240, 171, 1, 0),
    (_MT_NLG, 8, 35, 1120, 2240, 167, 1, 0),
    (_MT_NLG, 8, 35, 2240, 2240, 159, 1, 0),
)


def _runs() -> tuple[Run, ...]:
    first = [
        Run(
            table="table 1",
            hidden=hidden,
            heads=heads,
            layers=layers,
            tensor=tensor,
            pipeline=pipeline,
            gpus=gpus,
            batch=batch,
            flops_per_s=teraflops * 1e12,
        )
        for hidden, heads, layers, tensor, pipeline, gpus, batch, teraflops in _TABLE_1
    ]
    second = [
        Run(
            table="table 2",
            hidden=hidden,
            heads=heads,
            layers=layers,
            tensor=tensor,
            pipeline=pipeline,
            gpus=gpus,
            batch=batch,
            flops_per_s=teraflops * 1e12,
            micro_batch=micro_batch,
            zero_stage=stage,
        )
        for (
            hidden,
            heads,
            layers,
        ), tensor, pipeline, gpus, batch, teraflops, micro_batch, stage in _TABLE_2
    ]
    return (*first, *second)


RUNS = _runs()
