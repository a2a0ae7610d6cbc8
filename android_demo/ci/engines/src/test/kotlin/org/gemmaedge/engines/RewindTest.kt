package org.gemmaedge.engines

import kotlin.random.Random
import kotlin.test.Test
import kotlin.test.assertContentEquals
import kotlin.test.assertEquals
import kotlin.test.assertFalse
import kotlin.test.assertTrue
import org.gemmaedge.core.Bundle
import org.gemmaedge.core.CacheLayout
import org.gemmaedge.core.Call
import org.gemmaedge.core.Engine
import org.gemmaedge.core.LayerCache

/** [canRewind] against caches played through slot by slot, and against the logits of the demo bundles. */
class RewindTest {
    private val draw = Random(1)

    private fun layout(style: String, slots: Int) =
        CacheLayout(style, 1000, 1, listOf(LayerCache("sliding_attention", slots, 1, 1), LayerCache("full_attention", 1000, 1, 1)))

    /** A cache of one layer: what each slot holds, as the number of the write. */
    private abstract class Cache(slots: Int) {
        val held = arrayOfNulls<Any>(slots)

        /** Writes [value] at [position]; what its query then sees, by position. */
        abstract fun feed(position: Int, value: Any): Map<Int, Any?>
    }

    /** As export/executorch/text.py: position p is in slot p mod slots, and the mask goes by the call's own end. */
    private class Ring(private val slots: Int, private val window: Int) : Cache(slots) {
        override fun feed(position: Int, value: Any): Map<Int, Any?> {
            held[position % slots] = value
            return (0 until slots)
                .associateBy { position - (position + slots - it) % slots }
                .filterKeys { it >= 0 && it > position - window }
                .mapValues { held[it.value] }
        }
    }

    /**
     * As GroupQueryAttention's windowed cache: when full, the oldest slots − window + 1 rows are dropped at once. Rows
     * that are not in use may hold anything, so here they hold nothing.
     */
    private class Compacting(private val slots: Int, private val window: Int) : Cache(slots) {
        private fun resident(tokens: Int): Int {
            var rows = 0
            repeat(tokens) {
                if (rows == slots) rows = window - 1
                rows++
            }
            return rows
        }

        override fun feed(position: Int, value: Any): Map<Int, Any?> {
            val (before, after) = resident(position) to resident(position + 1)
            if (after <= before) held.copyInto(held, 0, before + 1 - after, before)
            held[after - 1] = value
            held.fill(null, after)
            return (0 until after).associateBy { position + 1 - after + it }
                .filterKeys { it > position - window }
                .mapValues { held[it.value] }
        }
    }

    private fun cache(style: String, slots: Int, window: Int): Cache =
        if (style == "ring") Ring(slots, window) else Compacting(slots, window)

    @Test
    fun itIsAllowedExactlyWhereTheCacheStillServes() {
        var allowed = 0
        for (style in listOf("ring", "compacting")) {
            for ((window, slots) in listOf(2 to 2, 2 to 5, 3 to 3, 3 to 5, 4 to 9, 6 to 6, 6 to 7, 8 to 24)) {
                for (from in 0..70) for (to in 0..from) {
                    val cache = cache(style, slots, window)
                    for (position in 0 until from) cache.feed(position, if (position < to) position else "old $position")
                    // What follows sees only positions before [to], and what was fed after the rewind.
                    val serves = (to until to + 2 * slots).all { position ->
                        cache.feed(position, position).all { (at, held) -> held == at }
                    }
                    val answer = layout(style, slots).canRewind(from, to, window)
                    assertEquals(serves, answer, "$style, window $window, $slots slots, from $from to $to")
                    if (answer) allowed++
                }
            }
        }
        assertTrue(allowed > 1000)
    }

    @Test
    fun itIsNeverAllowedForwards() {
        assertFalse(layout("ring", 100).canRewind(5, 6, 3))
        assertFalse(layout("ring", 100).canRewind(5, -1, 3))
    }

    /** After a rewind, the logits are those of an engine that was never fed more, to the last bit. */
    @Test
    fun afterARewindTheLogitsAreThoseOfAFreshSequence() {
        for (format in Bundles.formats) {
            val bundle = Bundles.read("demo")
            Engines.open(bundle, format, threads = 1).use { engine ->
                val pairs = pairs(bundle, format)
                assertTrue(pairs.count { it.second > 0 } > 15, "$format: $pairs")
                for ((from, to) in pairs) {
                    assertContentEquals(fresh(engine, bundle, to), rewound(engine, bundle, from, to), "$format, from $from to $to")
                }
            }
        }
    }

    /** One position outside the bound, the logits are others: the bound is needed. */
    @Test
    fun outsideTheBoundTheLogitsAreOthers() {
        for (format in Bundles.formats) {
            val bundle = Bundles.read("demo")
            val unaware = Bundle(bundle.folder, bundle.manifest.copy(model = bundle.manifest.model.copy(slidingWindow = 1)))
            Engines.open(unaware, format, threads = 1).use { engine ->
                val window = bundle.manifest.model.slidingWindow
                val slots = slots(bundle, format)
                val outside = when (format) {
                    "pte" -> listOf(200, 300, 500).map { it + slots - window + 2 to it }
                    else -> listOf(slots + 1 to slots, slots + (slots - window + 1) + 1 to slots + 1)
                }
                for ((from, to) in outside) {
                    val layout = bundle.artifact(format).cache
                    assertFalse(layout.canRewind(from, to, window), "$format, from $from to $to")
                    assertTrue(layout.canRewind(from - 1, to, window), "$format, from ${from - 1} to $to")
                    if (!layout.canRewind(from, to, 1)) continue // then the engine cannot be made to do it
                    val (right, wrong) = fresh(engine, bundle, to) to rewound(engine, bundle, from, to)
                    assertFalse(right.contentEquals(wrong), "$format, from $from to $to")
                }
            }
        }
    }

    @Test
    fun aRefusedRewindChangesNothing() {
        for (format in Bundles.formats) {
            val bundle = Bundles.read("demo")
            Engines.open(bundle, format, threads = 1).use { engine ->
                feed(engine, bundle, 0, 500, salt = 0)
                assertFalse(engine.rewind(300))
                assertEquals(500, engine.position)
                assertFalse(engine.rewind(501))
            }
        }
    }

    private fun slots(bundle: Bundle, format: String) =
        bundle.artifact(format).cache.layers.first { it.kind == "sliding_attention" }.slots

    /** Where a rewind is allowed: to the very edge, and drawn. */
    private fun pairs(bundle: Bundle, format: String): List<Pair<Int, Int>> {
        val layout = bundle.artifact(format).cache
        val window = bundle.manifest.model.slidingWindow
        fun allowed(from: Int, to: Int) = layout.canRewind(from, to, window)
        val edges = (1..900 step 75).map { to -> (to..960).last { allowed(it, to) } to to }
        val drawn = generateSequence { draw.nextInt(1, 900).let { to -> draw.nextInt(to, to + 140) to to } }
            .filter { (from, to) -> allowed(from, to) }
        return edges + drawn.take(8) + listOf(500 to 0)
    }

    private fun id(bundle: Bundle, position: Int, salt: Int) = 10 + (position * 7919 + salt * 104_729) % (bundle.manifest.model.vocabSize - 10)

    /** Feeds the positions from [start] to [end], in chunks. */
    private fun feed(engine: Engine, bundle: Bundle, start: Int, end: Int, salt: Int) {
        for (at in start until end step bundle.manifest.chunk) {
            val ids = IntArray(minOf(bundle.manifest.chunk, end - at)) { id(bundle, at + it, salt) }
            engine.feed(Call.Text(ids))
        }
    }

    /** The logits of what follows [to]: single tokens, then a chunk. */
    private fun after(engine: Engine, bundle: Bundle, to: Int): FloatArray {
        var logits = FloatArray(0)
        for (position in to until to + 2) logits += engine.feed(Call.Text(intArrayOf(id(bundle, position, salt = 0))))
        return logits + engine.feed(Call.Text(IntArray(40) { id(bundle, to + 2 + it, salt = 0) }))
    }

    private fun fresh(engine: Engine, bundle: Bundle, to: Int): FloatArray {
        engine.reset()
        feed(engine, bundle, 0, to, salt = 0)
        return after(engine, bundle, to)
    }

    private fun rewound(engine: Engine, bundle: Bundle, from: Int, to: Int): FloatArray {
        engine.reset()
        feed(engine, bundle, 0, to, salt = 0)
        feed(engine, bundle, to, from, salt = 1)
        assertTrue(engine.rewind(to), "from $from to $to")
        assertEquals(to, engine.position)
        return after(engine, bundle, to)
    }
}
