"""The PyTorch side: the tutorial's network, its training loop, and the fastest loop that we could write.

Written from the experiment's description; what `fashion_jax` is compared with, never a part of it.
"""

from collections.abc import Iterator
from typing import cast

import numpy as np
import PIL.Image
import torch
from torch import nn
from torch.nn.functional import log_softmax, nll_loss, relu

from fashion_jax.data import Batch
from fashion_jax.train import Params


class TutorialMLP(nn.Module):
    """784-256-128-64-10 with ReLU, dropout after each hidden ReLU, log-softmax output."""

    def __init__(self, dropout_rate: float):
        super().__init__()
        self.fc1 = nn.Linear(784, 256)
        self.fc2 = nn.Linear(256, 128)
        self.fc3 = nn.Linear(128, 64)
        self.fc4 = nn.Linear(64, 10)
        self.dropout: nn.Module = nn.Dropout(dropout_rate)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map standardised images to log-probabilities."""
        x = x.view(x.shape[0], -1)
        for layer in (self.fc1, self.fc2, self.fc3):
            x = self.dropout(relu(layer(x)))
        return log_softmax(self.fc4(x), dim=1)


def set_params(model: TutorialMLP, params: Params) -> None:
    """Give the PyTorch network the weights of a `FashionMLP`."""
    with torch.no_grad():
        for name, layer in params.items():
            linear = cast(nn.Linear, model.get_submodule(name))
            linear.weight.copy_(torch.tensor(np.asarray(layer["kernel"]).T))
            linear.bias.copy_(torch.tensor(np.asarray(layer["bias"])))


def standardise(images: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Map pixels to [-1, 1] in the tutorial's two steps."""
    return (images.to(dtype) / 255 - 0.5) / 0.5


class TransformedImages(torch.utils.data.Dataset):
    """One image at a time through PIL, as torchvision's data set and transforms do it."""

    def __init__(self, batch: Batch):
        self.images, self.labels = np.asarray(batch.images), np.asarray(batch.labels)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        picture = PIL.Image.fromarray(self.images[index])
        pixels = torch.from_numpy(np.array(picture))[None].to(torch.float32).div(255)
        return (pixels - 0.5) / 0.5, int(self.labels[index])


class TutorialLoop:
    """The tutorial's training: Dataset, DataLoader, per-image transforms, `loss.item()` at each step."""

    def __init__(self, train: Batch, *, dropout_rate: float, batch_size: int = 64, seed: int = 0):
        torch.manual_seed(seed)
        self.model = TutorialMLP(dropout_rate)
        self.optimiser = torch.optim.Adam(self.model.parameters(), lr=0.003)
        self.loader = torch.utils.data.DataLoader(TransformedImages(train), batch_size=batch_size, shuffle=True)

    def epoch(self) -> float:
        """Train for one epoch; return the mean of the batch losses."""
        self.model.train()
        total = 0.0
        for images, labels in self.loader:
            self.optimiser.zero_grad()
            loss = nll_loss(self.model(images), labels)
            loss.backward()
            self.optimiser.step()
            total += loss.item()
        return total / len(self.loader)

    def evaluate(self, batch: Batch) -> tuple[float, float]:
        """Measure loss and accuracy, batch by batch, as the tutorial does."""
        loader = torch.utils.data.DataLoader(TransformedImages(batch), batch_size=self.loader.batch_size)
        return _evaluate(self.model, loader)


class FastLoop:
    """Tensors in memory, fused Adam, no synchronisation within an epoch; optionally compiled."""

    def __init__(
        self,
        train: Batch,
        *,
        dropout_rate: float,
        batch_size: int = 64,
        seed: int = 0,
        device: str = "cpu",
        compiled: bool = False,
    ):
        torch.manual_seed(seed)
        self.device, self.batch_size = device, batch_size
        self.images = standardise(torch.tensor(np.asarray(train.images))).view(-1, 784).to(device)
        self.labels = torch.tensor(np.asarray(train.labels), dtype=torch.int64, device=device)
        self.model = TutorialMLP(dropout_rate).to(device)
        self.optimiser = torch.optim.Adam(self.model.parameters(), lr=0.003, fused=True)
        self.loss = torch.compile(self._loss) if compiled else self._loss

    def _loss(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return nll_loss(self.model(images), labels)

    def epoch(self) -> float:
        """Train for one epoch; return the mean of the batch losses."""
        self.model.train()
        losses = []
        for rows in torch.randperm(len(self.labels), device=self.device).split(self.batch_size):
            loss = self.loss(self.images[rows], self.labels[rows])
            self.optimiser.zero_grad()
            loss.backward()
            self.optimiser.step()
            losses.append(loss.detach())
        return torch.stack(losses).mean().item()

    def evaluate(self, batch: Batch) -> tuple[float, float]:
        """Measure loss and accuracy in chunks of 2,000."""
        images = standardise(torch.tensor(np.asarray(batch.images))).to(self.device)
        labels = torch.tensor(np.asarray(batch.labels), dtype=torch.int64, device=self.device)
        return _evaluate(self.model, zip(images.split(2_000), labels.split(2_000), strict=True))


@torch.no_grad()
def _evaluate(model: nn.Module, batches: Iterator | torch.utils.data.DataLoader) -> tuple[float, float]:
    model.eval()
    loss, correct, n = 0.0, 0, 0
    for images, labels in batches:
        log_probs = model(images)
        loss += nll_loss(log_probs, labels, reduction="sum").item()
        correct += int((log_probs.argmax(dim=1) == labels).sum())
        n += len(labels)
    return loss / n, correct / n
