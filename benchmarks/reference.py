"""The PyTorch side: the tutorial's network, its training loop, and the fastest loop that we could write.

Written from the experiment's description; what `fashion_jax` is compared with, never a part of it.
"""

import copy
import functools
import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import PIL.Image
import torch
from torch import nn
from torch.nn.functional import log_softmax, nll_loss, relu

from fashion_jax.types import Batch, Params

# Operations that autograd and optimizers call, without what is around them.
log_softmax_backward = torch.ops.aten._log_softmax_backward_data.out
threshold_backward = torch.ops.aten.threshold_backward.grad_input
fused_adamw = torch.ops.aten._fused_adamw_.default
ADAM = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "amsgrad": False, "maximize": False}
# Widths of the hidden layers.
HIDDEN = (256, 128, 64)
# Images and labels of a data set, batch by batch.
Batches = Iterable[tuple[torch.Tensor, torch.Tensor]]


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
        """Map normalized images to log-probabilities."""
        x = x.view(x.shape[0], -1)
        for layer in (self.fc1, self.fc2, self.fc3):
            x = self.dropout(relu(layer(x)))
        return log_softmax(self.fc4(x), dim=1)


class BatchedMLP(nn.Module):
    """`TutorialMLP` for many models at once, on the first axis of every tensor; each has a dropout rate of its own."""

    def __init__(self, dropout_rates: Sequence[float]):
        super().__init__()
        self.register_buffer("keep", 1 - torch.tensor(dropout_rates)[:, None, None])
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for inputs, outputs in itertools.pairwise((784, *HIDDEN, 10)):
            # As nn.Linear draws them.
            bound = inputs**-0.5
            for parameters, rows in ((self.weights, inputs), (self.biases, 1)):
                parameters.append(torch.empty(len(dropout_rates), rows, outputs).uniform_(-bound, bound))

    def masks(self, n: int) -> tuple[torch.Tensor, ...]:
        """Draw the masks of a batch of n, for all hidden layers at once."""
        keep = cast(torch.Tensor, self.keep)
        return (torch.bernoulli(keep.expand(-1, n, sum(HIDDEN))) / keep).split(HIDDEN, dim=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images of all models [n, 784], or of each [models, n, 784], to log-probabilities [models, n, 10]."""
        x = x.expand(len(self.weights[0]), -1, -1)
        masks = self.masks(x.shape[1]) if self.training else ()
        *hidden, (weight, bias) = zip(self.weights, self.biases, strict=True)
        for (weights, biases), mask in itertools.zip_longest(hidden, masks):
            x = relu(torch.baddbmm(biases, x, weights))
            x = x if mask is None else x * mask
        return log_softmax(torch.baddbmm(bias, x, weight), dim=2)


@torch.no_grad()
def set_params(model: TutorialMLP, params: Params) -> None:
    """Copy the parameters of a `FashionMLP` into the PyTorch network."""
    for name, layer in params.items():
        linear = cast(nn.Linear, model.get_submodule(name))
        linear.weight.copy_(torch.tensor(np.asarray(layer["kernel"]).T))
        linear.bias.copy_(torch.tensor(np.asarray(layer["bias"])))


def normalize(images: torch.Tensor) -> torch.Tensor:
    """Map pixels to [-1, 1] in the tutorial's two steps."""
    return (images.to(torch.float32) / 255 - 0.5) / 0.5


class InMemory(NamedTuple):
    """A data set for PyTorch in memory, which several loops can share: normalized images [n, 784], labels [n]."""

    images: torch.Tensor
    labels: torch.Tensor


Examples = Batch | InMemory


def in_memory(batch: Examples, device: str) -> InMemory:
    """Bring a data set to the device, unless that is done."""
    if isinstance(batch, InMemory):
        return batch
    images = normalize(torch.tensor(np.asarray(batch.images), device=device)).view(-1, 784)
    return InMemory(images, torch.tensor(np.asarray(batch.labels), dtype=torch.int64, device=device))


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

    def __init__(self, train: Batch, *, dropout_rate: float, batch_size: int = 64, seed: int = 0, device: str = "cpu"):
        torch.manual_seed(seed)
        self.device = device
        self.model = TutorialMLP(dropout_rate).to(device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.003)
        self.loader = torch.utils.data.DataLoader(TransformedImages(train), batch_size=batch_size, shuffle=True)

    def epoch(self) -> float:
        """Train for one epoch; return the mean of the batch losses."""
        self.model.train()
        total = 0.0
        for images, labels in self.loader:
            self.optimizer.zero_grad()
            loss = nll_loss(self.model(images.to(self.device)), labels.to(self.device))
            loss.backward()
            self.optimizer.step()
            total += loss.item()
        return total / len(self.loader)

    def prepare(self, batch: Batch) -> Batches:
        """Convert a data set for `evaluate`."""
        return torch.utils.data.DataLoader(TransformedImages(batch), batch_size=self.loader.batch_size)

    def evaluate(self, batches: Batches) -> tuple[float, float]:
        """Measure loss and accuracy, batch by batch, as the tutorial does."""
        return _evaluate(self.model, ((images.to(self.device), labels.to(self.device)) for images, labels in batches))


class FastLoop:
    """Tensors in memory, fused Adam, no synchronization within an epoch; optionally compiled."""

    network: Any = TutorialMLP
    # Whether steps are recorded, which the optimizer has to know.
    recorded = False

    def __init__(self, train: Examples, *, dropout_rate: Any, batch_size=64, seed=0, device="cpu", compiled=False):
        torch.manual_seed(seed)
        self.device, self.batch_size = device, batch_size
        self.images, self.labels = in_memory(train, device)
        self.model = self.network(dropout_rate).to(device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.003, fused=True, capturable=self.recorded)
        self.loss = torch.compile(self._loss) if compiled else self._loss

    def _loss(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return nll_loss(self.model(images), labels)

    def order(self) -> torch.Tensor:
        """Shuffle the training set."""
        return torch.randperm(len(self.labels), device=self.device)

    def epoch(self) -> Any:
        """Train for one epoch; return the mean of the batch losses."""
        self.model.train()
        losses = [self.step(rows) for rows in self.order().split(self.batch_size, dim=-1)]
        return torch.stack(losses).mean(dim=0).tolist()

    def step(self, rows: torch.Tensor) -> torch.Tensor:
        """Train on these rows of the training set; return the batch's loss."""
        loss = self.loss(self.images[rows], self.labels[rows])
        self.optimizer.zero_grad()
        loss.backward(torch.ones_like(loss))
        self.optimizer.step()
        return loss.detach()

    def prepare(self, batch: Examples, size: int = 2_000) -> Batches:
        """Convert a data set for `evaluate`: chunks, where the training data are."""
        images, labels = in_memory(batch, self.device)
        return list(zip(images.split(size), labels.split(size), strict=True))

    def evaluate(self, batches: Batches) -> tuple[Any, Any]:
        """Measure loss and accuracy."""
        return _evaluate(self.model, batches)


class MaskedLoop(FastLoop):
    """`FastLoop` with the dropout masks of an epoch drawn at once, and its images put in order at once."""

    def __init__(self, train: Examples, *, dropout_rate: float, **options: Any):
        super().__init__(train, dropout_rate=dropout_rate, **options)
        self.rate, self.targets = dropout_rate, self.labels
        self.masks = [torch.ones(len(self.labels), width, device=self.device) for width in HIDDEN]
        self.inputs = torch.empty_like(self.images)

    def epoch(self) -> float:
        """Train for one epoch; return the mean of the batch losses."""
        if self.rate:
            for mask in self.masks:
                draw(mask, self.rate)
        return self.train_on(self.order(), self.masks).mean().item()

    def train_on(self, order: torch.Tensor, masks: Iterable[torch.Tensor]) -> torch.Tensor:
        """Train on the examples in this order, with these masks; return the batches' losses."""
        torch.index_select(self.images, 0, order, out=self.inputs[:, :784])
        parts = (self.inputs, self.targets[order], *masks)
        batches = zip(*(part.split(self.batch_size) for part in parts), strict=True)
        return torch.stack([self.masked_step(*batch) for batch in batches])

    def masked_step(self, images: torch.Tensor, targets: torch.Tensor, *masks: torch.Tensor) -> torch.Tensor:
        """Train on a batch with these masks; return its loss."""
        loss = masked_loss(list(self.model.parameters()), images, targets, masks)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def draw(mask: torch.Tensor, rate: float) -> None:
    """Fill a mask with 0 where a unit is dropped, and with what makes up for it elsewhere."""
    # 16 bits decide on a unit, and 64 are drawn at a time: bernoulli_ takes three times as long.
    bits = torch.empty(mask.numel() // 4, dtype=torch.int64, device=mask.device).random_(-(2**63), None)
    kept = bits.view(torch.int16).view_as(mask) >= round(rate * 2**16) - 2**15
    mask.copy_(kept).div_(1 - rate)


def masked_loss(params: list[torch.Tensor], x: torch.Tensor, labels: torch.Tensor, masks: Any) -> torch.Tensor:
    """Compute the batch's loss by functions of weights and biases alone."""
    *hidden, (weight, bias) = zip(params[::2], params[1::2], strict=True)
    for (weights, biases), mask in zip(hidden, masks, strict=True):
        x = relu(torch.addmm(biases, x, weights.t())) * mask
    return nll_loss(log_softmax(torch.addmm(bias, x, weight.t()), dim=1), labels)


class CompiledLoop(MaskedLoop):
    """Forward, backward and AdamW as one function, compiled by torch.compile; without weight decay it is Adam."""

    def __init__(self, train: Examples, *, learning_rate=0.003, weight_decay=0.0, **options: Any):
        super().__init__(train, **options)
        self.params = [param.detach() for param in self.model.parameters()]
        self.moments = [[torch.zeros_like(param) for param in self.params] for _ in range(2)]
        self.count, self.learning_rate = 0, learning_rate
        # As tensors, so that other numbers compile nothing: what weights shrink by, and Adam's corrections.
        numbers = (1 - learning_rate * weight_decay, 1.0, 1.0)
        self.numbers = [torch.tensor(number, device=self.device) for number in numbers]
        self.update: Any = torch.compile(_update, fullgraph=True, dynamic=False)

    def masked_step(self, images: torch.Tensor, targets: torch.Tensor, *masks: torch.Tensor) -> torch.Tensor:
        """Train on a batch, as `MaskedLoop` does."""
        self.count += 1
        # Compiled, the powers would be computed for every parameter anew.
        _, scale, correction = self.numbers
        scale.fill_(self.learning_rate / (1 - 0.9**self.count))
        correction.fill_((1 - 0.999**self.count) ** -0.5)
        return self.update(self.params, self.moments, self.numbers, images, targets, masks)


def _update(params: Any, moments: Any, numbers: Any, x: Any, labels: Any, masks: Any) -> torch.Tensor:
    shrinkage, scale, correction = numbers
    grads, loss = torch.func.grad_and_value(masked_loss)(params, x, labels, masks)
    for param, mean, square, grad in zip(params, *moments, grads, strict=True):
        mean.lerp_(grad, 0.1)
        square.mul_(0.999).addcmul_(grad, grad, value=0.001)
        param.mul_(shrinkage).sub_(scale * mean / (square.sqrt() * correction + 1e-8))
    return loss


class Layer(NamedTuple):
    """What a step of `HandLoop` needs of a layer: numbers of the whole network, memory for a batch, and their views."""

    weight: torch.Tensor  # [inputs + 1, outputs]; the last row is the bias.
    weight_t: torch.Tensor  # Without the bias.
    grad: torch.Tensor
    output: torch.Tensor
    with_one: torch.Tensor  # The output, and the one that the next layer's bias is multiplied with.
    with_one_t: torch.Tensor
    delta: torch.Tensor  # The gradient of what the layer's product is.


class HandLoop(MaskedLoop):
    """No autograd: a backward pass by hand in as few operations as PyTorch has for it, and AdamW on one flat vector."""

    def __init__(self, train: Examples, *, learning_rate=0.003, weight_decay=0.0, **options: Any):
        super().__init__(train, **options)
        self.numbers = {"lr": learning_rate, "weight_decay": weight_decay}
        linears = [layer for layer in self.model.children() if isinstance(layer, nn.Linear)]
        shapes = [(linear.in_features + 1, linear.out_features) for linear in linears]
        sizes = [inputs * outputs for inputs, outputs in shapes]
        # Parameters, their gradient, and Adam's two moments.
        self.vectors = torch.zeros(4, sum(sizes), device=self.device).unbind()
        self.count = torch.zeros((), device=self.device)
        weights, grads = (
            [part.view(shape) for part, shape in zip(vector.split(sizes), shapes, strict=True)]
            for vector in self.vectors[:2]
        )
        for linear, weight in zip(linears, weights, strict=True):
            weight[:-1], weight[-1] = linear.weight.detach().t(), linear.bias.detach()
            linear.weight.data, linear.bias.data = weight[:-1].t(), weight[-1]
        self.inputs = torch.ones(len(self.images), 785, device=self.device)
        # Their product with a batch's log-probabilities is its loss.
        self.targets = torch.eye(10, device=self.device)[self.labels] / -self.batch_size
        self.layers = functools.cache(lambda n: [self._layer(*both, n) for both in zip(weights, grads, strict=True)])

    def _layer(self, weight: torch.Tensor, grad: torch.Tensor, n: int) -> Layer:
        with_one = torch.ones(n, weight.shape[1] + 1, device=self.device)
        output = with_one[:, :-1]
        return Layer(weight, weight[:-1].t(), grad, output, with_one, with_one.t(), torch.empty_like(output))

    def masked_step(self, images: torch.Tensor, targets: torch.Tensor, *masks: torch.Tensor) -> torch.Tensor:
        """Train on a batch, as `MaskedLoop` does."""
        if (n := len(images)) < self.batch_size:
            targets = targets * (self.batch_size / n)
        layers, x = self.layers(n), images
        *hidden, top = layers
        for layer, mask in zip(hidden, masks, strict=True):
            torch.mm(x, layer.weight, out=layer.output)
            layer.output.relu_().mul_(mask)
            x = layer.with_one
        torch.mm(x, top.weight, out=top.delta)
        log_probs = log_softmax(top.delta, dim=1)
        log_softmax_backward(targets, log_probs, 1, torch.float32, out=top.delta)
        for below, layer in zip(reversed(hidden), reversed(layers), strict=False):
            torch.mm(below.with_one_t, layer.delta, out=layer.grad)
            below.delta.addmm_(layer.delta, layer.weight_t, beta=0, alpha=1 / (1 - self.rate))
            # A unit passes on a gradient where it is on.
            threshold_backward(below.delta, below.output, 0, grad_input=below.delta)
        torch.mm(images.t(), layers[0].delta, out=layers[0].grad)
        self.count += 1
        vectors = [[vector] for vector in self.vectors]
        fused_adamw(*vectors, [], [self.count], **self.numbers, **ADAM)
        return torch.dot(targets.view(-1), log_probs.view(-1))


class BatchedLoop(FastLoop):
    """`FastLoop` for many models in one step, with a dropout rate and an order of the data for each."""

    network = BatchedMLP

    def _loss(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return -self.model(images).gather(2, labels[..., None]).mean(dim=(1, 2))

    def order(self) -> torch.Tensor:
        """Shuffle the training set for each model."""
        models = len(self.model.weights[0])
        return torch.rand(models, len(self.labels), device=self.device).argsort(dim=1)

    def prepare(self, batch: Examples, size: int = 2_000) -> Batches:
        """Convert a data set for `evaluate`: the more models, the smaller the chunks, to save memory."""
        return super().prepare(batch, max(1, min(size, 2**19 // len(self.model.weights[0]))))


class GraphLoop(FastLoop):
    """On a GPU, `FastLoop` with a whole step recorded as a CUDA graph, which the host then launches as one.

    Source: "Whole-network capture" in PyTorch's notes on CUDA.
    """

    recorded = True

    def __init__(self, train: Examples, **options: Any):
        super().__init__(train, **options)
        before = copy.deepcopy(self.model.state_dict())
        self.rows = self.order()[..., : self.batch_size].clone()
        # What PyTorch sets up at first use must not be recorded.
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(3):
                super().step(self.rows)
        torch.cuda.current_stream().wait_stream(beside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.batch_loss = super().step(self.rows)
        # Those steps have trained; a recorded step keeps to the tensors that it was recorded with.
        self.model.load_state_dict(before)
        for state in self.optimizer.state.values():
            for moment in state.values():
                moment.zero_()

    def step(self, rows: torch.Tensor) -> torch.Tensor:
        """Train for a step as `FastLoop` does: by the graph, or by itself where the batch is short."""
        if rows.shape[-1] < self.batch_size:
            return super().step(rows)
        self.rows.copy_(rows)
        self.graph.replay()
        return self.batch_loss.clone()


class BatchedGraphLoop(GraphLoop, BatchedLoop):
    """`BatchedLoop` as a CUDA graph."""


@torch.no_grad()
def _evaluate(model: nn.Module, batches: Batches) -> tuple[Any, Any]:
    model.eval()
    losses, correct, n = [], [], 0
    for images, labels in batches:
        log_probs = model(images)
        losses.append(-log_probs[..., torch.arange(len(labels), device=labels.device), labels].sum(dim=-1))
        correct.append((log_probs.argmax(dim=-1) == labels).sum(dim=-1))
        n += len(labels)
    loss, accuracy = (torch.stack(sums).double().sum(dim=0) / n for sums in (losses, correct))
    return loss.tolist(), accuracy.tolist()
