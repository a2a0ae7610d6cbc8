package org.gemmaedge.core

enum class StopReason { STOP_TOKEN, LENGTH, CONTEXT, CANCELLED }

/** What one call of the engine is fed: at most a chunk of text, or an image in place of its image tokens. */
sealed interface Feed {
    val ids: IntArray

    class Text(override val ids: IntArray) : Feed

    class Image(val pixels: Pixels, override val ids: IntArray) : Feed
}

/**
 * The calls that feed [ids] at [position], in order: text in chunks, each of [images] whole.
 *
 * Throws [BadInput] for no ids, for an id outside the vocabulary, for images of another number or size than the
 * prompt's image tokens say, and [DoesNotFit] when the ids are over the context.
 */
fun feeds(manifest: Manifest, ids: IntArray, images: List<Pixels> = emptyList(), position: Int = 0): List<Feed> {
    val vision = manifest.model.vision
    checkIds(manifest, ids, images.size, position)
    if (vision == null && images.isNotEmpty()) {
        throw BadInput("${counted(images.size, "image")} for a text-only model; leave images out")
    }
    val feeds = ArrayList<Feed>()
    var at = 0
    var image = 0
    while (at < ids.size) {
        val isImage = ids[at] == vision?.imageTokenId
        var end = at
        while (end < ids.size && (ids[end] == vision?.imageTokenId) == isImage) end++
        if (isImage) {
            feeds += Feed.Image(imageFor(images, image++, vision!!, end - at), ids.copyOfRange(at, end))
        } else {
            for (start in at until end step manifest.chunk) {
                feeds += Feed.Text(ids.copyOfRange(start, minOf(start + manifest.chunk, end)))
            }
        }
        at = end
    }
    if (image != images.size) throw wrongImages(image, images.size)
    return feeds
}

private fun checkIds(manifest: Manifest, ids: IntArray, images: Int, position: Int) {
    if (ids.isEmpty()) throw BadInput("the prompt is empty; give at least one token")
    val rows = manifest.model.vocabSize
    val wrong = ids.indexOfFirst { it !in 0 until rows }
    if (wrong >= 0) {
        throw BadInput(
            "token id ${ids[wrong]} at index $wrong is outside the vocabulary of $rows; export the bundle again",
        )
    }
    if (position + ids.size > manifest.context) {
        val among = if (images > 0) " (${counted(images, "image")} among them)" else ""
        throw DoesNotFit(
            "${ids.size} tokens$among after position $position are over the context of ${manifest.context}; " +
                "shorten the text, begin a new chat or export with a larger --context",
        )
    }
}

private fun imageFor(images: List<Pixels>, index: Int, vision: Vision, tokens: Int): Pixels {
    val pixels = images.getOrNull(index) ?: throw wrongImages(index + 1, images.size)
    if (tokens != vision.tokensPerImage) {
        throw BadInput(
            "$tokens image tokens in a row, but an image has ${vision.tokensPerImage}; export the bundle again",
        )
    }
    if (pixels.size != vision.imageSize) {
        throw BadInput("an image has ${pixels.size} × ${pixels.size} pixels, the model takes ${vision.imageSize}")
    }
    return pixels
}

private fun wrongImages(places: Int, images: Int) = BadInput(
    "the prompt has image tokens for ${counted(places, "image")}, but $images given; " +
        "give one image for each run of image tokens",
)

/** An engine, and what it was fed since its last reset. Nothing else may feed the engine meanwhile. */
internal class Fed(private val engine: Engine, private val manifest: Manifest) {
    private val ids = Ids()
    private val images = ArrayList<Pixels>()
    private var isKnown = false // not before the first reset, nor after an error within a call

    val size: Int get() = ids.size

    fun feed(feed: Feed): FloatArray {
        isKnown = false
        val logits = engine.feed(
            when (feed) {
                is Feed.Text -> Call.Text(feed.ids)
                is Feed.Image -> Call.Image(engine.encode(feed.pixels))
            },
        )
        ids += feed.ids
        if (feed is Feed.Image) images += feed.pixels
        isKnown = true
        return logits
    }

    /**
     * What is left to feed of [wanted] and [pictures], a whole sequence from position 0.
     *
     * What the engine holds of it stays there, if the engine can go back to it; otherwise the engine is reset. Throws
     * as [feeds] does, and changes nothing then.
     */
    fun align(wanted: IntArray, pictures: List<Pixels>): List<Feed> {
        val all = feeds(manifest, wanted, pictures)
        val common = if (isKnown && engine.position == ids.size) common(wanted, pictures) else Place(0, 0)
        val stays = common.ids > 0 && (common.ids == ids.size || engine.rewind(common.ids))
        if (!stays) {
            engine.reset()
            isKnown = true
        }
        ids.cut(if (stays) common.ids else 0)
        images.subList(if (stays) common.images else 0, images.size).clear()
        return if (stays) {
            feeds(manifest, wanted.copyOfRange(ids.size, wanted.size), pictures.drop(images.size), ids.size)
        } else {
            all
        }
    }

    fun reset() {
        engine.reset()
        ids.cut(0)
        images.clear()
        isKnown = true
    }

    private class Place(val ids: Int, val images: Int)

    /** How far the two sequences are the same. Always before the last id of [wanted], whose logits are to come. */
    private fun common(wanted: IntArray, pictures: List<Pixels>): Place {
        var at = 0
        var image = 0
        while (at < ids.size && at < wanted.size - 1 && ids[at] == wanted[at]) {
            if (ids[at] == manifest.model.vision?.imageTokenId) {
                if (!images[image].rgb.contentEquals(pictures[image].rgb)) break
                image++
                at += manifest.model.vision.tokensPerImage
            } else {
                at++
            }
        }
        return Place(at, image)
    }
}

/**
 * Generates the ids that follow what an engine was fed, and feeds them. The image token is never drawn.
 *
 * A full context ends the generation and is not an error. [reason] says why it ended. Throws [BadInput] for a
 * [maxNewTokens] below 1.
 */
class Generation internal constructor(
    private val manifest: Manifest,
    private val fed: Fed,
    private val sampler: Sampler,
    private val maxNewTokens: Int?,
) {
    private var logits: FloatArray? = null
    private var drawn: Int? = null // and not fed
    private var count = 0

    var reason: StopReason? = null
        private set

    init {
        if (maxNewTokens != null && maxNewTokens < 1) {
            throw BadInput("the number of new tokens is $maxNewTokens; use 1 or more")
        }
    }

    constructor(manifest: Manifest, engine: Engine, sampler: Sampler, maxNewTokens: Int? = null) :
        this(manifest, Fed(engine, manifest), sampler, maxNewTokens)

    /** Resets the engine and feeds a prompt, looking at [cancelled] before each call. False if it was cancelled. */
    fun prefill(ids: IntArray, images: List<Pixels> = emptyList(), cancelled: () -> Boolean = { false }): Boolean {
        val feeds = feeds(manifest, ids, images)
        fed.reset()
        return feeds.all { feed(it, cancelled) }
    }

    /** Feeds a part of the prompt. False, and nothing is fed, if it is [cancelled]. */
    fun feed(feed: Feed, cancelled: () -> Boolean): Boolean {
        if (cancelled()) reason = StopReason.CANCELLED else logits = fed.feed(feed)
        return reason == null
    }

    /** The next id; null at the end. [cancelled] is looked at before each call of the engine. */
    fun next(cancelled: () -> Boolean = { false }): Int? {
        if (reason == null) reason = feedDrawn(cancelled)
        if (reason != null) return null
        val token = sampler.sample(drawable(checkNotNull(logits) { "nothing was fed" }))
        if (token in manifest.tokenizer.eosIds) {
            reason = StopReason.STOP_TOKEN
            return null
        }
        drawn = token
        count++
        return token
    }

    private fun feedDrawn(cancelled: () -> Boolean): StopReason? {
        val token = drawn
        return when {
            count == maxNewTokens -> StopReason.LENGTH
            token != null && fed.size == manifest.context -> StopReason.CONTEXT
            cancelled() -> StopReason.CANCELLED
            else -> {
                if (token != null) logits = fed.feed(Feed.Text(intArrayOf(token)))
                null
            }
        }
    }

    private fun drawable(logits: FloatArray): FloatArray {
        manifest.model.vision?.let { logits[it.imageTokenId] = Float.NEGATIVE_INFINITY }
        return logits
    }
}
