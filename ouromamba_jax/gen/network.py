"""A model of any family as the losses see it: equal blocks as one, each rematerialised with its patch losses."""

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from ouromamba_jax.data.preprocessing import Preprocessing
from ouromamba_jax.gen.config import GenConfig
from ouromamba_jax.gen.losses import (
    contrastive_loss,
    contrastive_pairs,
    output_loss,
    patch_similarity_entropy,
    total_variation,
)
from ouromamba_jax.models.base import VisionModel
from ouromamba_jax.models.trace import AttentionTrace, LayerTrace
from ouromamba_jax.ops.attention import implicit_attention, patched_readout


class Network(NamedTuple):
    """The static part of a model: module graphs, one for every run of equal blocks, and pixel statistics."""

    stem: Any
    blocks: tuple[Any, ...]
    head: Any
    preprocessing: Preprocessing


def split(model: VisionModel) -> tuple[Network, tuple[Any, tuple[Any, ...], Any]]:
    """(network, weights): the graph of each part, and its state, which jit sees as an argument.

    Blocks in a row that differ in their values alone are one part; its state has a leading axis for them.
    """
    stem, head = nnx.split(model.stem), nnx.split(model.head)
    runs = [list(run) for _, run in itertools.groupby(map(nnx.split, model.blocks), key=_structure)]
    states = tuple(jax.tree.map(lambda *leaves: jnp.stack(leaves), *(state for _, state in run)) for run in runs)
    network = Network(stem[0], tuple(run[0][0] for run in runs), head[0], model.config.preprocessing)
    return network, (stem[1], states, head[1])


def _structure(block: tuple[Any, Any]) -> Any:
    """What two blocks have in common that one program computes."""
    graph, state = block
    return graph, jax.tree.structure(state), [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(state)]


def patch_losses(layer: LayerTrace, config: GenConfig, batch: int) -> dict[str, Float[Array, " B"]]:
    """The losses of one block, means over its windows: of the patched attention of a scan, or of what an attention
    block adds to its tokens (OuroMamba, supplement H); none for a block with neither."""
    is_attention = isinstance(layer, AttentionTrace)
    if not (layer.scans or is_attention) or not (config.contrastive or config.pse):
        return {}
    window, weighting = config.neighbourhood, config.weighting
    order = layer.order if isinstance(layer, AttentionTrace) else layer.scans[0].order
    if is_attention:
        features = order.to_image(layer.mixer_out)
    elif config.features == "attention":
        features = implicit_attention(layer, neighbourhood=window, weighting=weighting)
    else:
        readouts = [patched_readout(scan, neighbourhood=window, weighting=weighting) for scan in layer.scans]
        features = functools.reduce(jnp.add, readouts)
    losses = {}
    grid = (order.height, order.width)
    if config.contrastive and has_contrast(grid, config):
        losses["contrastive"] = contrastive_loss(
            features,
            grid=grid,
            neighbourhood=config.neighbourhood,
            positives=config.positives,
            negatives=config.negatives,
            temperature=config.temperature,
        )
    if config.pse:
        losses["pse"] = patch_similarity_entropy(features)
    return {name: jnp.mean(loss.reshape(batch, -1), axis=1) for name, loss in losses.items()}


def has_contrast(grid: tuple[int, int], config: GenConfig) -> bool:
    """Whether any token of the grid has a negative: the last maps of a pyramid can be too small for that."""
    return bool(contrastive_pairs(grid, config.neighbourhood, config.positives, config.negatives)[2].any())


def image_losses(
    network: Network, weights: Any, images: Float[Array, "B H W I"], targets: Int[Array, " B"], config: GenConfig
) -> dict[str, Float[Array, " B"]]:
    """Every loss with a weight, unweighted, one value per image; patch losses are means over the layers."""
    stem, blocks, head = weights
    collect = (lambda h: h) if config.features == "readout" and (config.contrastive or config.pse) else None

    def run_block(graph: Any, x: Array, state: Any) -> tuple[Array, dict[str, Array]]:
        x, layer = nnx.merge(graph, state).trace(x, collect=collect)
        return x, patch_losses(layer, config, images.shape[0])

    x = nnx.merge(network.stem, stem)(images)
    runs = []
    for graph, states in zip(network.blocks, blocks, strict=True):
        # Rematerialised with its losses, a block leaves only x behind: never are two blocks' hidden states alive.
        block = jax.checkpoint(functools.partial(run_block, graph))
        if len(jax.tree.leaves(states)[0]) == 1:  # which may change the shape of x
            x, losses = block(x, jax.tree.map(lambda leaf: leaf[0], states))
            losses = {name: loss[None] for name, loss in losses.items()}
        else:
            x, losses = jax.lax.scan(block, x, states)
        runs.append(losses)
    losses = {}
    for name in ("contrastive", "pse"):
        values = [run[name] for run in runs if name in run]
        if getattr(config, name) and not values:
            raise ValueError(
                f"no layer of this model can have the {name} loss: it has no scan, or its maps leave no negatives; use "
                f'fewer positives, negatives="all", or {name}=0.'
            )
        if values:
            losses[name] = jnp.mean(jnp.concatenate(values), axis=0)
    if config.output:
        losses["output"] = output_loss(nnx.merge(network.head, head)(x), targets)
    if config.total_variation:
        losses["total_variation"] = total_variation(images * network.preprocessing.mean_and_std()[1])
    return losses
