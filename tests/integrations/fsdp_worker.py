"""Training steps of a tiny Llama on accelerate's FSDP2, one process of several; called by test_transformers_fsdp.py.

With one process the model stays whole, and the process trains on every row: what the others are compared with.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from s2_models import longlora, right_padding, tiny, tokens

STEPS = 3
BATCHES = {
    "mask": (29, {"attention_mask": right_padding(29, 17, 21, 8)}),
    "adapters": (29, {"attention_mask": right_padding(29, 17, 21, 8)}),
    "position_ids": (40, {"position_ids": torch.cat([torch.arange(13), torch.arange(27)])[None].repeat(4, 1)}),
}


def model_of(what: str) -> torch.nn.Module:
    return longlora(tiny()) if what == "adapters" else tiny()


def trained(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def loss_of(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    out = model(**batch, use_cache=False).logits
    if "attention_mask" in batch:
        out = out * batch["attention_mask"][..., None]
    return out.square().mean()


def batches(what: str) -> list[dict[str, torch.Tensor]]:
    length, options = BATCHES[what]
    return [{"input_ids": tokens(4, length, seed=seed), **options} for seed in range(STEPS)]


def train_alone(what: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    model = model_of(what).train()
    optimizer = torch.optim.AdamW(trained(model), 1e-2)
    losses = []
    for batch in batches(what):
        loss = loss_of(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, model.state_dict()


def train_sharded(what: str, checkpointing: bool) -> tuple[list[float], dict[str, torch.Tensor]]:
    from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
    from torch.distributed.tensor import DTensor

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        activation_checkpointing=checkpointing,
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    # accelerate turns its plugin on for accelerators alone; what it then runs is the same on a CPU.
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    assert accelerator.num_processes == 2 and accelerator.is_fsdp2
    model = model_of(what).train()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(trained(model), 1e-2))
    for name, p in model.named_parameters():
        assert isinstance(p, DTensor) and 2 * p.to_local().numel() == p.numel(), name
        assert ("_checkpoint_wrapped_module" in name) == (checkpointing and "layers" in name), name
    first = 2 * accelerator.process_index
    losses = []
    for batch in batches(what):
        loss = loss_of(model, {name: rows[first : first + 2] for name, rows in batch.items()})
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        losses.append(accelerator.reduce(loss.detach(), "mean").item())
    whole = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in model.state_dict().items()}
    accelerator.end_training()
    return losses, whole


if __name__ == "__main__":
    what, checkpointing, result = sys.argv[1], sys.argv[2] == "True", Path(sys.argv[3])
    losses, weights = train_sharded(what, checkpointing)
    torch.save((losses, weights), result)
    # Without the interpreter's teardown, in which torch's gloo threads may abort it (pytorch/pytorch#179291).
    os._exit(0)
