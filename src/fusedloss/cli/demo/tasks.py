"""The tasks of `fusedloss demo`: one for each loss, on data that ships inside scikit-learn."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...losses import composed


class Split(NamedTuple):
    """A data set, scaled, and cut into a part to train on and a part held out."""

    inputs: Tensor
    labels: Tensor
    held_inputs: Tensor
    held_labels: Tensor


Arguments = tuple[Tensor, ...]


@dataclass(frozen=True)
class Problem:
    """What a task trains: the initial model, its data and how the result is judged."""

    model: nn.Module
    inputs: Tensor
    targets: Tensor
    score: Callable[[nn.Module], float]
    options: Mapping[str, Any] = field(default_factory=dict)
    # What the loss takes, of the model's outputs and the targets of a batch.
    arguments: Callable[[Arguments, Tensor], Arguments] = lambda outputs, targets: (
        *outputs,
        targets,
    )
    parts: bool = False  # the model's outputs are several, stacked


@dataclass(frozen=True)
class Task:
    """A loss, the problem it is for, and how long and how fast to train."""

    loss: str
    title: str
    metric: str
    build: Callable[[int], Problem]
    rate: float
    epochs: int
    batch: int = 128
    # Several rows for each of a batch; such losses have a hinge.
    draw: Callable[[Tensor, Tensor, torch.Generator], Tensor] | None = None

    @property
    def reference(self) -> Any:
        """PyTorch's module, or what its users write where it has none."""
        return getattr(nn, self.loss, None) or WRITTEN[self.loss]

    def batches(self, targets: Tensor, epochs: int, seed: int) -> Iterator[Tensor]:
        """Row numbers of each batch: (batch,), or (3, batch) where the loss takes triplets."""
        generator = torch.Generator().manual_seed(seed)
        for _ in range(epochs):
            for rows in torch.randperm(len(targets), generator=generator).split(self.batch):
                yield rows if self.draw is None else self.draw(rows, targets, generator)

    def steps(self, targets: Tensor, epochs: int) -> int:
        return epochs * -(-len(targets) // self.batch)


def triplets_of(anchors: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """For each anchor a random other row of its class and a random row of another class."""
    count = labels.bincount()
    end = count.cumsum(0)
    order = labels.argsort(stable=True)
    position = order.argsort()[anchors]
    own, after = count[labels[anchors]], end[labels[anchors]]
    draw = torch.rand(2, len(anchors), generator=generator, dtype=torch.float64)
    first = after - own
    step = 1 + (draw[0] * (own - 1)).long()
    positives = order[first + (position - first + step) % own]
    # In the circle of rows sorted by class, all that lie past the end of a class are of others.
    negatives = order[(after + (draw[1] * (len(labels) - own)).long()) % len(labels)]
    return torch.stack([anchors, positives, negatives])


def pairs_of(first: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """With each a random row, of its class for about half of them."""
    _, same, other = triplets_of(first, labels, generator)
    alike = torch.rand(len(first), generator=generator) < 0.5
    return torch.stack([first, torch.where(alike, same, other)])


@cache
def load(name: str, seed: int) -> Split:
    """The scikit-learn data set `name` with a third of it held out."""
    from sklearn import datasets, model_selection, preprocessing

    inputs, labels = getattr(datasets, f"load_{name}")(return_X_y=True)
    train, held, train_labels, held_labels = model_selection.train_test_split(
        inputs,
        labels,
        test_size=1 / 3,
        random_state=seed,
        stratify=None if name == "diabetes" else labels,
    )
    if name == "digits":
        train, held = train / 16.0, held / 16.0
    else:
        scaler = preprocessing.StandardScaler().fit(train)
        train, held = scaler.transform(train), scaler.transform(held)
    dtype = torch.float32 if name == "diabetes" else torch.int64
    return Split(
        torch.tensor(train, dtype=torch.float32),
        torch.tensor(train_labels, dtype=dtype),
        torch.tensor(held, dtype=torch.float32),
        torch.tensor(held_labels, dtype=dtype),
    )


def mlp(*widths: int, last: nn.Module | None = None) -> nn.Sequential:
    """Linear layers with tanh between: smooth, so that training does not amplify rounding."""
    layers: list[nn.Module] = []
    for index, (fan_in, fan_out) in enumerate(pairwise(widths)):
        layers += [nn.Tanh()] * (index > 0) + [nn.Linear(fan_in, fan_out)]
    return nn.Sequential(*layers, *([last] if last is not None else []))


def accuracy(inputs: Tensor, labels: Tensor) -> Callable[[nn.Module], float]:
    return lambda model: (model(inputs).argmax(1) == labels).double().mean().item()


def nearest_neighbour(data: Split, metric: str) -> Callable[[nn.Module], float]:
    """Accuracy on held-out rows of the label of the nearest training row in the embedding."""
    from sklearn.neighbors import KNeighborsClassifier

    def score(model: nn.Module) -> float:
        search = KNeighborsClassifier(1, metric=metric, algorithm="brute")
        search.fit(model(data.inputs).numpy(), data.labels.numpy())
        return float(search.score(model(data.held_inputs).numpy(), data.held_labels.numpy()))

    return score


def cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    return 1.0 - nn.functional.cosine_similarity(a, b, dim=-1)


def diabetes(seed: int) -> Problem:
    from sklearn.metrics import r2_score

    data = load("diabetes", seed)
    mean, deviation = data.labels.mean(), data.labels.std()
    truth = ((data.held_labels - mean) / deviation).numpy()
    return Problem(
        model=mlp(10, 8, 1, last=nn.Flatten(0)),
        inputs=data.inputs,
        targets=(data.labels - mean) / deviation,
        score=lambda model: float(r2_score(truth, model(data.held_inputs).numpy())),
    )


def outliers(seed: int) -> Problem:
    """A tenth of the labels that are trained on is wrong by far."""
    clean = diabetes(seed)
    wrong = torch.randperm(len(clean.targets))[: len(clean.targets) // 10]
    targets = clean.targets.clone()
    targets[wrong] += 5.0
    return dataclasses.replace(clean, targets=targets, options={"delta": 0.5})


class MeanAndVariance(nn.Module):
    """Of pairs of numbers, stacked: the first, and a positive one of the second."""

    def forward(self, pairs: Tensor) -> Tensor:
        mean, raw = pairs.unbind(-1)
        return torch.stack([mean, nn.functional.softplus(raw) + 0.01])


def uncertain(seed: int) -> Problem:
    data = load("diabetes", seed)
    mean, deviation = data.labels.mean(), data.labels.std()
    truth = (data.held_labels - mean) / deviation

    def likelihood(model: nn.Module) -> float:
        centre, variance = model(data.held_inputs)
        normal = torch.distributions.Normal(centre, variance.sqrt())
        return normal.log_prob(truth).mean().item()

    return Problem(
        model=mlp(10, 8, 2, last=MeanAndVariance()),
        inputs=data.inputs,
        targets=(data.labels - mean) / deviation,
        score=likelihood,
        arguments=lambda outputs, targets: (outputs[0], targets, outputs[1]),
        parts=True,
    )


def alike(seed: int) -> Problem:
    data = load("digits", seed)

    def arguments(outputs: Arguments, labels: Tensor) -> Arguments:
        return *outputs, torch.where(labels[0] == labels[1], 1, -1)

    return Problem(
        model=mlp(64, 48, 8),
        inputs=data.inputs,
        targets=data.labels,
        score=nearest_neighbour(data, "cosine"),
        options={"margin": 0.3},
        arguments=arguments,
    )


class Columns(nn.Module):
    """Swaps the last two dimensions: columns over time, or classes last."""

    def forward(self, images: Tensor) -> Tensor:
        return images.transpose(1, 2)


def numbers(seed: int) -> Problem:
    """Numbers of three digits, side by side, read column by column; class 0 is the blank."""
    data, size = load("digits", seed), 3

    def strips(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        order = torch.randperm(len(images) - len(images) % size).view(-1, size)
        rows = images[order].view(-1, size, 8, 8).permute(0, 2, 1, 3)
        return rows.reshape(-1, 8, 8 * size), labels[order] + 1

    inputs, targets = strips(data.inputs, data.labels)
    held, truth = strips(data.held_inputs, data.held_labels)

    def arguments(outputs: Arguments, labels: Tensor) -> Arguments:
        steps = outputs[0].transpose(0, 1)
        return steps, labels, *(torch.full((len(labels),), n) for n in (len(steps), size))

    def right(model: nn.Module) -> float:
        found = [row.unique_consecutive() for row in model(held).argmax(-1)]
        pairs = zip(found, truth, strict=True)
        return sum(torch.equal(row[row > 0], number) for row, number in pairs) / len(truth)

    hidden = nn.Conv1d(8, 48, 9, padding=4)
    layers = (hidden, nn.Tanh(), nn.Conv1d(48, 11, 5, padding=2), Columns(), nn.LogSoftmax(-1))
    return Problem(nn.Sequential(*layers), inputs, targets, right, arguments=arguments)


class DiceFocal(nn.Module):
    """In operations of PyTorch."""

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return composed.dice_focal(logits, target)


WRITTEN = {"DiceFocalLoss": DiceFocal}


def strokes(seed: int) -> Problem:
    """Which pixels of a digit are ink, under noise."""
    from sklearn.metrics import f1_score

    data = load("digits", seed)

    def noisy(images: Tensor) -> Tensor:
        return (images + 0.4 * torch.randn(images.shape)).view(-1, 1, 8, 8)

    def ink(images: Tensor) -> Tensor:
        return (images > 0.5).long().view(-1, 8, 8)

    held, truth = noisy(data.held_inputs), ink(data.held_inputs)
    layers = (nn.Conv2d(1, 12, 3, padding=1), nn.Tanh(), nn.Conv2d(12, 2, 3, padding=1))
    return Problem(
        model=nn.Sequential(*layers),
        inputs=noisy(data.inputs),
        targets=ink(data.inputs),
        score=lambda model: float(f1_score(truth.flatten(), model(held).argmax(1).flatten())),
    )


def counts(seed: int) -> Problem:
    """How many of a digit's 64 pixels are dark, from the other half of its pixels."""
    data = load("digits", seed)
    half = 32

    def dark(images: Tensor) -> Tensor:
        return (images[:, half:] > 0.5).sum(1).float()

    def deviance(model: nn.Module) -> float:
        from sklearn.metrics import d2_tweedie_score

        rates = model(data.held_inputs[:, :half]).exp().numpy()
        return float(d2_tweedie_score(dark(data.held_inputs).numpy(), rates, power=1))

    return Problem(
        model=mlp(half, 16, 1, last=nn.Flatten(0)),
        inputs=data.inputs[:, :half],
        targets=dark(data.inputs),
        score=deviance,
        options={"full": True},
    )


def autoencoder(seed: int) -> Problem:
    data = load("digits", seed)

    def error(pixels: Tensor) -> float:
        return (pixels - data.held_inputs).square().mean().sqrt().item()

    return Problem(
        model=mlp(64, 32, 64, last=nn.Sigmoid()),
        inputs=data.inputs,
        targets=data.inputs,
        score=lambda model: error(model(data.held_inputs)),
    )


ATTRIBUTES = {
    "even": (0, 2, 4, 6, 8),
    "prime": (2, 3, 5, 7),
    "square": (0, 1, 4, 9),
    "five or more": (5, 6, 7, 8, 9),
    "drawn with a loop": (0, 6, 8, 9),
}


def attributes(seed: int) -> Problem:
    from sklearn.metrics import f1_score

    data = load("digits", seed)
    table = torch.tensor(
        [[digit in having for having in ATTRIBUTES.values()] for digit in range(10)]
    )
    targets, truth = table[data.labels].float(), table[data.held_labels].numpy()

    def score(model: nn.Module) -> float:
        return float(f1_score(truth, (model(data.held_inputs) > 0).numpy(), average="macro"))

    return Problem(
        model=mlp(64, 48, len(ATTRIBUTES)),
        inputs=data.inputs,
        targets=targets,
        score=score,
        options={"pos_weight": (1.0 - targets).sum(0) / targets.sum(0)},
    )


def distillation(seed: int) -> Problem:
    data = load("digits", seed)
    teacher = mlp(64, 256, 10)
    optimizer = torch.optim.Adam(teacher.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(teacher(data.inputs), data.labels).backward()
        optimizer.step()
    temperature = 2.0
    with torch.no_grad():
        targets = (teacher(data.inputs) / temperature).log_softmax(1)
    return Problem(
        model=mlp(64, 16, 10, last=nn.LogSoftmax(1)),
        inputs=data.inputs,
        targets=targets,
        score=accuracy(data.held_inputs, data.held_labels),
        options={"reduction": "batchmean", "log_target": True},
    )


def digits(seed: int) -> Problem:
    data = load("digits", seed)
    return Problem(
        model=mlp(64, 48, 10),
        inputs=data.inputs,
        targets=data.labels,
        score=accuracy(data.held_inputs, data.held_labels),
        options={"label_smoothing": 0.05},
    )


def wine(seed: int) -> Problem:
    data = load("wine", seed)
    counts = data.labels.bincount().float()
    return Problem(
        model=mlp(13, 16, 3, last=nn.LogSoftmax(1)),
        inputs=data.inputs,
        targets=data.labels,
        score=accuracy(data.held_inputs, data.held_labels),
        options={"weight": counts.mean() / counts},
    )


def embedding(seed: int) -> Problem:
    data = load("digits", seed)
    return Problem(
        model=mlp(64, 64, 8),
        inputs=data.inputs,
        targets=data.labels,
        score=nearest_neighbour(data, "euclidean"),
        options={"margin": 0.5},
        arguments=lambda outputs, _: outputs,
    )


def tumours(seed: int) -> Problem:
    data = load("breast_cancer", seed)
    return Problem(
        model=mlp(30, 16, 4),
        inputs=data.inputs,
        targets=data.labels,
        score=nearest_neighbour(data, "cosine"),
        options={"distance_function": cosine_distance, "margin": 1.0, "swap": True},
        arguments=lambda outputs, _: outputs,
    )


TASKS = (
    Task("MSELoss", "diabetes progression", "R²", diabetes, 0.01, 80, 98),
    Task("BCELoss", "digits, autoencoded", "RMSE", autoencoder, 2.0, 50),
    Task("BCEWithLogitsLoss", "attributes of digits", "F1", attributes, 0.1, 50),
    Task("KLDivLoss", "digits, distilled", "accuracy", distillation, 0.1, 50),
    Task("CrossEntropyLoss", "digits", "accuracy", digits, 0.1, 50),
    Task("NLLLoss", "wine cultivars", "accuracy", wine, 0.05, 60, 32),
    Task("TripletMarginLoss", "digits, embedded", "1-NN", embedding, 0.05, 80, 300, triplets_of),
    Task(
        *("TripletMarginWithDistanceLoss", "tumours, by cosine", "1-NN", tumours, 0.02, 120, 190),
        draw=triplets_of,
    ),
    Task("HuberLoss", "diabetes, outliers", "R²", outliers, 0.03, 80, 98),
    Task("PoissonNLLLoss", "dark pixels", "D²", counts, 0.002, 30),
    Task("GaussianNLLLoss", "diabetes, uncertain", "log p", uncertain, 0.01, 80, 98),
    Task("CosineEmbeddingLoss", "digits, alike", "1-NN", alike, 0.05, 60, 300, pairs_of),
    Task("CTCLoss", "numbers of 3 digits", "read", numbers, 0.02, 60, 32),
    Task("DiceFocalLoss", "ink under noise", "F1", strokes, 0.05, 20),
)
