package org.gemmaedge.core

import kotlin.random.Random
import kotlin.test.Test
import kotlin.test.assertContentEquals
import kotlin.test.assertEquals
import kotlin.test.assertFailsWith
import kotlin.test.assertTrue

class GenerationTest {
    @Test
    fun aPromptIsSplitIntoChunksAndWholeImages() {
        val manifest = demoBundle(seeing = true, chunk = 5).manifest
        val image = manifest.model.vision!!.imageTokenId
        val draw = Random(1)
        repeat(500) {
            val ids = ArrayList<Int>()
            val images = ArrayList<Pixels>()
            repeat(draw.nextInt(1, 5)) {
                ids += List(draw.nextInt(1, 20)) { draw.nextInt(20, 4096) }
                if (draw.nextBoolean()) {
                    ids += List(4) { image }
                    images += Pixels(8, ByteArray(192) { images.size.toByte() })
                }
            }
            val feeds = feeds(manifest, ids.toIntArray(), images)
            assertEquals(ids, feeds.flatMap { it.ids.toList() })
            assertEquals<List<Pixels>>(images, feeds.filterIsInstance<Feed.Image>().map { it.pixels })
            assertTrue(feeds.all { it.ids.size in 1..5 })
            assertTrue(feeds.filterIsInstance<Feed.Image>().all { it.ids.size == 4 })
            assertTrue(feeds.zipWithNext().none { (a, b) -> a is Feed.Text && b is Feed.Text && a.ids.size < 5 })
        }
    }

    @Test
    fun whatMustNotReachAGraphIsRefused() {
        val manifest = demoBundle(seeing = true, context = 20).manifest
        val image = manifest.model.vision!!.imageTokenId
        val pixels = Pixels(8, ByteArray(192))
        fun message(ids: List<Int>, images: List<Pixels> = emptyList(), position: Int = 0): String =
            assertFailsWith<UserError> { feeds(manifest, ids.toIntArray(), images, position) }.message!!
        assertTrue("is empty" in message(emptyList()))
        assertTrue("id 4096 at index 1" in message(listOf(5, 4096)))
        assertTrue("id -1 at index 0" in message(listOf(-1)))
        assertTrue("21 tokens after position 0 are over the context of 20" in message(List(21) { 5 }))
        assertTrue("2 tokens after position 19" in message(listOf(5, 5), position = 19))
        assertTrue("for 1 image, but 0 given" in message(List(4) { image }))
        assertTrue("for 0 images, but 1 given" in message(listOf(5), listOf(pixels)))
        assertTrue("8 image tokens in a row" in message(List(8) { image }, listOf(pixels, pixels)))
        assertTrue("7 × 7" in message(List(4) { image }, listOf(Pixels(7, ByteArray(147)))))
        val blind = assertFailsWith<BadInput> { feeds(demoBundle().manifest, intArrayOf(5), listOf(pixels)) }
        assertTrue("text-only" in blind.message!!)
        feeds(manifest, IntArray(20) { 5 })
    }

    private fun tokens(generation: Generation) = generateSequence { generation.next() }.toList()

    @Test
    fun aGenerationEndsAtTheStopTokenTheLengthOrTheContext() {
        val reasons = HashMap<StopReason, Int>()
        for (seed in 0 until 200) {
            val manifest = demoBundle(context = 30, chunk = 7).manifest
            val engine = FakeEngine(manifest)
            val limit = if (seed % 2 == 0) 10 else null
            val generation = Generation(manifest, engine, Sampler(Sampling(1.0), seed.toLong()), limit)
            assertTrue(generation.prefill(intArrayOf(2, 20 + seed, 30)))
            val ids = tokens(generation)
            val reason = generation.reason!!
            reasons.merge(reason, 1, Int::plus)
            assertTrue(ids.none { it == 1 || it == 6 })
            when (reason) {
                StopReason.STOP_TOKEN -> assertEquals(3 + ids.size, engine.position)
                StopReason.LENGTH -> assertEquals(10, ids.size)
                // The last position has no room, but what the id before it predicts is still given.
                StopReason.CONTEXT -> assertEquals(30 to 28, engine.position to ids.size)
                StopReason.CANCELLED -> error("nobody did")
            }
            assertContentEquals(intArrayOf(2, 20 + seed, 30) + ids.take(engine.position - 3), engine.fed.toIntArray())
            assertEquals(null, generation.next())
        }
        assertEquals(setOf(StopReason.STOP_TOKEN, StopReason.LENGTH, StopReason.CONTEXT), reasons.keys)
    }

    @Test
    fun cancellingIsLookedForBeforeEveryCall() {
        val manifest = demoBundle(chunk = 3).manifest
        for (after in 0..9) {
            val engine = FakeEngine(manifest)
            var looks = 0
            val cancelled = { looks++ == after }
            val generation = Generation(manifest, engine, Sampler(Sampling()), 5)
            val ids = if (generation.prefill(IntArray(10) { 30 + it }, cancelled = cancelled)) {
                generateSequence { generation.next(cancelled) }.toList()
            } else {
                emptyList()
            }
            // Four calls of prompt, then one look before each id.
            assertEquals(minOf(after, 4) + maxOf(0, minOf(after - 5, 4)), engine.calls.size, "$after")
            assertEquals(if (after < 9) StopReason.CANCELLED else StopReason.LENGTH, generation.reason)
            assertEquals(maxOf(0, minOf(after - 4, 5)), ids.size)
        }
    }

    @Test
    fun theImageTokenIsNeverDrawn() {
        val manifest = demoBundle(seeing = true).manifest
        val image = manifest.model.vision!!.imageTokenId
        for (settings in listOf(Sampling(), Sampling(1.0), Sampling(2.0, 3, 0.9))) {
            val toy = FakeEngine(manifest)
            val engine = object : Engine by toy {
                override fun feed(call: Call) = toy.feed(call).also { it[image] = 1000f }
            }
            val generation = Generation(manifest, engine, Sampler(settings), 50)
            generation.prefill(intArrayOf(2, 30))
            val ids = tokens(generation)
            assertTrue(image !in ids && ids.isNotEmpty())
        }
    }

    @Test
    fun noNewTokensAreRefused() {
        val manifest = demoBundle().manifest
        assertFailsWith<BadInput> { Generation(manifest, FakeEngine(manifest), Sampler(Sampling()), 0) }
    }
}
