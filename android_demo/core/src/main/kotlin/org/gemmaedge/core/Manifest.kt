package org.gemmaedge.core

import kotlinx.serialization.SerialName
import kotlinx.serialization.Serializable

/**
 * What the phone reads of a bundle's `manifest.json`. docs/bundle.md describes the whole file.
 *
 * Keys that the phone does not need are ignored: the laptop's `gemma-edge validate` checks them.
 */
@Serializable
data class Manifest(
    @SerialName("schema_version") val schemaVersion: String,
    val model: Model,
    val recipe: String,
    val method: String,
    val context: Int,
    val chunk: Int,
    val tokenizer: TokenizerInfo,
    val artifacts: Map<String, Artifact>,
    val files: Map<String, FileEntry>,
    val sampling: Sampling = Sampling(),
)

/** The size in bytes and the sha256 of one file of a bundle. */
@Serializable
data class FileEntry(val size: Long, val sha256: String)

/** The sizes of the model that feeding it needs. */
@Serializable
data class Model(
    @SerialName("vocab_size") val vocabSize: Int,
    @SerialName("hidden_size") val hiddenSize: Int,
    @SerialName("layer_types") val layerTypes: List<String>,
    @SerialName("sliding_window") val slidingWindow: Int,
    val vision: Vision? = null,
)

/** The vision model: images are [imageSize] × [imageSize] pixels and become [tokensPerImage] soft tokens. */
@Serializable
data class Vision(
    @SerialName("image_size") val imageSize: Int,
    @SerialName("tokens_per_image") val tokensPerImage: Int,
    @SerialName("image_token_id") val imageTokenId: Int,
    @SerialName("begin_image_token_id") val beginImageTokenId: Int,
    @SerialName("end_image_token_id") val endImageTokenId: Int,
)

/** Special ids, and the form of conversations: "gemma" is Gemma's own, which takes no Jinja to make. */
@Serializable
data class TokenizerInfo(
    val sha256: String,
    @SerialName("bos_id") val bosId: Int,
    @SerialName("eos_ids") val eosIds: List<Int>,
    @SerialName("special_ids") val specialIds: Map<String, Int>,
    @SerialName("chat_format") val chatFormat: String = "gemma",
)

/** One exported graph: its files, caches, methods, and the runtime versions that it was checked with. */
@Serializable
data class Artifact(
    val file: String,
    val files: List<String>,
    val cache: CacheLayout,
    val methods: List<Method>,
    val references: List<String>,
    val versions: Map<String, String>,
    val bytes: Long,
    @SerialName("peak_memory_estimate") val peakMemoryEstimate: Long,
)

/** A method of a .pte, or a graph of an .onnx. */
@Serializable
data class Method(val name: String, val file: String)

/**
 * The static KV caches. [style] "ring": position p is in slot p mod slots; "compacting": rows stay in order.
 *
 * Keys and values are [dtype] "float32", or "int8" codes, whose scales the graph has.
 */
@Serializable
data class CacheLayout(
    val style: String,
    val context: Int,
    val chunk: Int,
    val layers: List<LayerCache>,
    val dtype: String = FLOAT32,
) {
    companion object {
        const val FLOAT32 = "float32"
        const val INT8 = "int8"
    }
}

/** Keys and values of one layer: [slots] positions of [heads] × [headDim] numbers each. */
@Serializable
data class LayerCache(
    val kind: String,
    val slots: Int,
    @SerialName("num_key_value_heads") val heads: Int,
    @SerialName("head_dim") val headDim: Int,
)

/** How ids are drawn: [temperature] (0: greedy), the [topK] most likely (0: all), the [topP] nucleus (1: all). */
@Serializable
data class Sampling(
    val temperature: Double = 0.0,
    @SerialName("top_k") val topK: Int = 0,
    @SerialName("top_p") val topP: Double = 1.0,
)
