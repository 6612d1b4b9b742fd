"""Heads that predict a drug's ln IC50 in a cell line from the line's embedding and the drug's chemistry."""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.device import is_cpu
from models.heads import Head
from models.masking import KeyedDropout

HIDDEN = 64
"""Width of the hidden layer of each member's line code."""
CODE = 100
"""Width of the codes of line and drug that the published head joins."""
GRAPH_WIDTHS = (128, 128)
"""Widths of the graph convolutions."""


@dataclass(frozen=True)
class DrugHeadConfig:
    """Shape of the head for drug responses. The numbers that follow from the data are set by the script."""

    drug: Literal["fingerprint", "graph"] = field(
        default="fingerprint",
        metadata={"help": "how drugs are read: Morgan fingerprints, or atom graphs by graph convolutions"},
    )
    head: Literal["scmomer", "published"] = field(
        default="scmomer",
        metadata={"help": "scmomer multiplies codes of line and drug; published joins them and convolves over them"},
    )
    members: int = field(default=8, metadata={"help": "networks in the head scmomer, whose mean is the prediction"})
    rank: int = field(default=32, metadata={"help": "products of line and drug codes in each of them"})
    head_dropout: float = field(default=0.3, metadata={"help": "dropout of line codes and drug codes"})
    n_lines: int = field(
        default=0, metadata={"help": "number of lines that have a code of their own; set by the split"}
    )
    n_known: int = field(
        default=0, metadata={"help": "number of drugs that have a code of their own; set by the split"}
    )
    n_atoms: int = field(default=0, metadata={"help": "atoms of the largest drug; set from the drugs"})
    n_features: int = field(default=0, metadata={"help": "bits of a fingerprint, or features of an atom; set likewise"})


class GraphEncoder(nn.Module):
    """Atom graphs → drug codes: graph convolutions (Kipf and Welling 2017), then the mean and the maximum of the atoms.

    Parameters
    ----------
    n_features : features of an atom
    width : of the code
    """

    def __init__(self, n_features: int, width: int):
        super().__init__()
        sizes = (n_features, *GRAPH_WIDTHS)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.out = nn.Linear(2 * sizes[-1], width)

    def forward(self, atoms: Tensor, bonds: Tensor) -> Tensor:
        """atoms [D, N, n_features], normalised bonds [D, N, N] (zero rows for padding) → [D, width]."""
        exists = (bonds.diagonal(dim1=1, dim2=2) > 0).float()[..., None]  # [D, N, 1]: an atom is bound to itself
        x = atoms
        for layer in self.layers:
            x = F.relu(layer(bonds @ x)) * exists
        mean = x.sum(1) / exists.sum(1).clamp(min=1)
        return self.out(torch.cat([mean, x.amax(1)], dim=1))


class DrugHead(Head):
    """ln IC50 of a line and a drug; condition `drug` and `line` [B] int64; target `ln_ic50` [B] float32.

    A folder has one output name for each drug, so `n_outputs` is the number of drugs, and the condition chooses one.
    The network predicts what is left over when the main effects of the training rows are subtracted, in units of the
    drug's spread. The main effects are constants: the drugs' means, and the lines' means, which are 0 for new lines.
    Row 0 of the lines' table stands for all lines that were not trained on.

    scmomer: each member adds an effect of the line, one of the drug, and products of their codes (factors). A code is
    read from the embedding or the chemistry. Lines and drugs of the training rows have a learned code of their own,
    too, where the split leaves them known (`n_lines`, `n_known`).
    published: codes of 100 numbers each are joined, and a dense layer and one-dimensional convolutions read them.

    Attributes
    ----------
    drugs : [D, n_features] fingerprints, or [D, n_atoms, n_features] atoms
    bonds : [D, n_atoms, n_atoms] normalised bonds of atom graphs
    base_drug, base_line, spread : main effects [D], [1 + lines] and the drugs' spreads [D]
    """

    loss_name = "squared error in units of a drug's spread"

    def __init__(self, config: DrugHeadConfig, latent_dim: int, n_outputs: int):
        is_ours = config.head == "scmomer"
        super().__init__(latent_dim, 1, 1, 0.0)
        self.layers = nn.ModuleList()  # those of a plain head are not used
        self.config, is_graph = config, config.drug == "graph"
        shape = (n_outputs, config.n_atoms, config.n_features) if is_graph else (n_outputs, config.n_features)
        self.register_buffer("drugs", torch.zeros(shape, dtype=torch.int8))
        self.register_buffer("bonds", torch.zeros(n_outputs, config.n_atoms, config.n_atoms) if is_graph else None)
        for name, size in (("base_drug", n_outputs), ("base_line", 1 + config.n_lines), ("spread", n_outputs)):
            self.register_buffer(name, torch.zeros(size))
        code = HIDDEN if is_ours else CODE
        self.chemistry = GraphEncoder(config.n_features, code) if is_graph else nn.Linear(config.n_features, code)
        self.drop_line, self.drop_drug = (KeyedDropout(config.head_dropout, stream) for stream in (6, 7))
        if is_ours:
            outputs = config.members * (config.rank + 1)
            self.line_hidden = nn.Linear(latent_dim, HIDDEN * config.members)
            self.line_out = nn.Parameter(torch.randn(config.members, HIDDEN, config.rank + 1) / HIDDEN**0.5)
            self.drug_out = nn.Linear(HIDDEN, outputs)
            nn.init.normal_(self.drug_out.weight, std=0.1 / HIDDEN**0.5)
            self.line_code = nn.Embedding(1 + config.n_lines, outputs) if config.n_lines else None
            self.drug_code = nn.Embedding(n_outputs, outputs) if config.n_known else None
            for embedding in (self.line_code, self.drug_code):
                if embedding is not None:
                    nn.init.normal_(embedding.weight, std=0.1)
        else:
            self.line_hidden = nn.Linear(latent_dim, CODE)
            self.dense = nn.Linear(2 * CODE, 300)
            self.convolutions = nn.Sequential(
                *(nn.Conv1d(1, 30, 15), nn.ReLU(), nn.MaxPool1d(2)),
                *(nn.Conv1d(30, 10, 5), nn.ReLU(), nn.MaxPool1d(3)),
                *(nn.Conv1d(10, 5, 5), nn.ReLU(), nn.MaxPool1d(3)),
            )
            self.regress = nn.Linear(5 * 14, 1)

    def set_drugs(self, drugs: Tensor, bonds: Tensor | None = None) -> None:
        """Take the drugs' fingerprints or atom graphs."""
        self.drugs.copy_(drugs)
        if bonds is not None:
            self.bonds.copy_(bonds)

    def set_means(self, drug: Tensor, line: Tensor, spread: Tensor) -> None:
        """Take the main effects [D] and [lines], which are used for lines with a code of their own, and spreads [D]."""
        self.base_drug.copy_(drug)
        self.base_line[1:].copy_(line[: self.config.n_lines])
        self.spread.copy_(spread)

    def drug_codes(self, drug: Tensor) -> Tensor:
        """Codes of the chemistry of drugs [D'] → [D', code width]."""
        read = self.drugs[drug].float()
        return self.chemistry(read, self.bonds[drug]) if self.config.drug == "graph" else self.chemistry(read)

    def forward(
        self, embedding: Tensor, key: Tensor | None = None, condition: dict[str, Tensor] | None = None
    ) -> Tensor:
        """[B, members + 2]: each member's prediction in units of the spread, the main effects, and the spread."""
        drug, line = condition["drug"], condition["line"].clamp(max=self.config.n_lines)
        x = (embedding - self.mean) / self.deviation
        if is_cpu(drug):
            different, which = drug.unique(return_inverse=True)  # a minibatch has few drugs, so each is read once
        else:
            different, which = torch.arange(len(self.drugs), device=drug.device), drug
        chemistry = F.relu(self.drug_codes(different))[which]  # [B, code]
        chemistry = self.drop_drug(chemistry, key)
        if self.config.head == "published":
            left = self._published(x, chemistry, key)
        else:
            left = self._ours(x, chemistry, key, drug, line)
        base, spread = self.base_drug[drug] + self.base_line[line], self.spread[drug]
        return torch.cat([left, base[:, None], spread[:, None]], dim=1)

    def _ours(self, x: Tensor, chemistry: Tensor, key, drug: Tensor, line: Tensor) -> Tensor:
        members, width = self.config.members, self.config.rank + 1
        hidden = self.drop_line(F.relu(self.line_hidden(x)), key).view(len(x), members, HIDDEN)
        of_line = torch.einsum("bmh,mhr->bmr", hidden, self.line_out)
        of_drug = self.drug_out(chemistry).view(len(x), members, width)
        if self.line_code is not None:
            of_line = of_line + self.line_code(line).view_as(of_line) * (line > 0)[:, None, None]
        if self.drug_code is not None:
            of_drug = of_drug + self.drug_code(drug).view_as(of_drug)
        products = (of_line[..., 1:] * of_drug[..., 1:]).sum(2)
        return of_line[..., 0] + of_drug[..., 0] + products  # [B, members]

    def _published(self, x: Tensor, chemistry: Tensor, key) -> Tensor:
        cell = self.drop_line(F.relu(self.line_hidden(x)), key)
        joined = torch.tanh(self.dense(torch.cat([cell, chemistry], dim=1)))  # [B, 300]
        return self.regress(self.convolutions(joined[:, None]).flatten(1))  # [B, 5, 14] → [B, 1]

    def loss(self, outputs: Tensor, target: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        *_, base, spread = outputs.unbind(1)
        wanted = ((target["ln_ic50"] - base) / spread)[:, None]
        members = outputs[:, :-2]
        together = (members.mean(1, keepdim=True) - wanted).square()[:, 0]
        return (members - wanted).square().mean(1), {"error_of_mean": together}

    def decode(self, outputs: Tensor) -> dict[str, Tensor]:
        *_, base, spread = outputs.unbind(1)
        return {"ln_ic50": base + spread * outputs[:, :-2].mean(1)}
