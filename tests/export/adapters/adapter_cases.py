"""Tiny random models, weights in memory, and peft adapters on them with random numbers that aren't zero."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir


class InMemory:
    """The `Weights` of a torch module."""

    def __init__(self, module: Any, dtype: Any = None) -> None:
        self.state = {name: value.detach().clone() for name, value in module.state_dict().items()}
        if dtype is not None:
            self.state = {n: v.to(dtype) if v.is_floating_point() else v for n, v in self.state.items()}
        seen: dict[int, str] = {}
        own = module.state_dict(keep_vars=True)
        self._first = {name: seen.setdefault(id(value), name) for name, value in own.items()}  # Tied: one object.
        self._tensors = {n: ir.tensor_adapters.TorchTensor(v, name=n) for n, v in self.state.items()}

    def names(self) -> Collection[str]:
        return self.state.keys()

    def tensor(self, name: str) -> ir.TensorProtocol:
        return self._tensors[self._first.get(name, name)]


def llama(**settings: Any) -> Any:
    import torch
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**sizes, **heads, **settings})).eval()


def mixtral(**settings: Any) -> Any:
    """Its experts are stacked in parameters [experts, out, in]."""
    import torch
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 3}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**{**sizes, **heads, **settings})).eval()


def square_mixtral() -> Any:
    """The two projections of its experts have the same shape but for which side is doubled."""
    return mixtral(hidden_size=16, intermediate_size=16)


def gpt_oss() -> Any:
    """Its experts are stacked in parameters [experts, in, out]."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.GptOssConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        num_local_experts=3,
    )
    return transformers.GptOssForCausalLM(config).eval()


def bert() -> Any:
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.4,
    )
    return transformers.BertForSequenceClassification(config).eval()


def gpt2() -> Any:
    """Its Conv1D layers store weights as [in, out], attn.c_proj a square one."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    return transformers.GPT2LMHeadModel(config).eval()


def convolutions() -> Any:
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Conv2d(4, 8, 3, padding=1)
            self.two = nn.Conv2d(8, 12, 1)
            self.along = nn.Conv1d(12, 8, 5, padding=2)
            self.head = nn.Linear(8, 3)

        def forward(self, x: Any) -> Any:
            y = torch.relu(self.two(torch.relu(self.one(x)))).flatten(2)
            return self.head(torch.relu(self.along(y)).mean(2))

    torch.manual_seed(0)
    return Net().eval()


def attention_module() -> Any:
    """nn.MultiheadAttention, whose q, k and v are one parameter in_proj_weight."""
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(16, 2, batch_first=True)

        def forward(self, x: Any) -> Any:
            return self.attn(x, x, x, need_weights=False)[0]

    torch.manual_seed(0)
    return Net().eval()


def save_adapter(
    folder: Path, make: Callable[[], Any], config: Any, *, scale: float = 0.3, seed: int = 1, dtype: Any = None
) -> Path:
    """An adapter of random numbers, saved by peft; of the base of `make` it depends on nothing random."""
    import peft
    import torch

    model = peft.get_peft_model(make(), config)
    if dtype is not None:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
    randomise(model, scale, seed)
    with torch.no_grad():
        model.save_pretrained(str(folder))
    return folder


def randomise(model: Any, scale: float, seed: int) -> None:
    """Add random numbers to everything that is trained."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += (scale * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype)


def merged_by_peft(make: Callable[[], Any], folder: Path, dtype: Any = None) -> dict[str, np.ndarray]:
    """The parameters of the base after peft's own merge_and_unload, by name; float32."""
    import peft
    import torch

    model = make()
    if dtype is not None:
        model = model.to(dtype)
    merged = peft.PeftModel.from_pretrained(model, str(folder)).eval().merge_and_unload()
    with torch.no_grad():
        return {n: v.detach().float().numpy() for n, v in merged.state_dict().items()}
