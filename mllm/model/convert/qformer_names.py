"""What transformers calls the tensors of a Q-Former: `{its name: our name}`, one entry a tensor.

Its names are those of a whole model's state dict, ours those within a connector. Both sides hold the same
tensors in the same layout, so a table of names is all that a conversion needs.
"""

from __future__ import annotations

_QUERY_MLP = {
    "intermediate_query.dense": "query_mlp.up",
    "output_query.dense": "query_mlp.down",
    "output_query.LayerNorm": "query_mlp.norm",
}
_TEXT_MLP = {
    "intermediate.dense": "text_mlp.up",
    "output.dense": "text_mlp.down",
    "output.LayerNorm": "text_mlp.norm",
}


def qformer_names(layers: int, instruct: bool, cross_every: int = 2) -> dict[str, str]:
    """Blip2ForConditionalGeneration to "qformer", InstructBlipForConditionalGeneration to "instruct_qformer".

    Queries and `language_projection` included.
    """
    names = {"query_tokens": "query"} | _pairs({"language_projection": "proj"})
    names |= _layers(layers, cross_every, text=instruct)
    if instruct:
        return names | _pairs({"qformer.embeddings.layernorm": "qformer.norm"}) | _words("qformer.embeddings")
    return names | _pairs({"qformer.layernorm": "qformer.norm"})


def retrieval_names(layers: int, cross_every: int = 2) -> dict[str, str]:
    """Blip2ForImageTextRetrieval, of which the text embeddings lie outside its Q-Former.

    Without its three heads, which no connector has.
    """
    names = {"query_tokens": "query"} | _pairs({"qformer.layernorm": "qformer.norm"}) | _words("embeddings")
    return names | _layers(layers, cross_every, text=True)


def bert_names(layers: int) -> dict[str, str]:
    """BertModel, from which BLIP-2's stage 1 starts: neither cross-attention nor query feed-forward.

    Not in the table, as a Q-Former has no such tensors: the pooler, and `embeddings.token_type_embeddings`
    (BERT adds its row 0 to every word; BLIP-2 leaves it out).
    """
    names = _pairs({"embeddings.LayerNorm": "qformer.norm"}) | _words("embeddings")
    for i in range(layers):
        below = _attention("attention.self", "attention.output", "attention") | _TEXT_MLP
        names |= _pairs(below, f"encoder.layer.{i}.", f"qformer.layers.{i}.")
    return names


def _layers(layers: int, cross_every: int, text: bool) -> dict[str, str]:
    names: dict[str, str] = {}
    for i in range(layers):
        below = _attention("attention.attention", "attention.output", "attention") | _QUERY_MLP
        if i % cross_every == 0:
            below |= _attention("crossattention.attention", "crossattention.output", "cross_attention")
        if text:
            below |= _TEXT_MLP
        names |= _pairs(below, f"qformer.encoder.layer.{i}.", f"qformer.layers.{i}.")
    return names


def _attention(inner: str, output: str, ours: str) -> dict[str, str]:
    names = {f"{inner}.{name}": f"{ours}.{name}" for name in ("query", "key", "value")}
    return names | {f"{output}.dense": f"{ours}.out", f"{output}.LayerNorm": f"{ours}.norm"}


def _words(theirs: str) -> dict[str, str]:
    names = ("word_embeddings.weight", "position_embeddings.weight")
    return {f"{theirs}.{name}": f"qformer.{name}" for name in names}


def _pairs(modules: dict[str, str], theirs: str = "", ours: str = "") -> dict[str, str]:
    """Names of modules to names of their weights and biases, below the two prefixes."""
    return {
        f"{theirs}{a}.{leaf}": f"{ours}{b}.{leaf}" for a, b in modules.items() for leaf in ("weight", "bias")
    }
