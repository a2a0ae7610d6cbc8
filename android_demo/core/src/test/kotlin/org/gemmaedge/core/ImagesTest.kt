package org.gemmaedge.core

import java.io.File
import java.lang.management.ManagementFactory
import java.nio.ByteBuffer
import kotlin.random.Random
import kotlin.test.Test
import kotlin.test.assertContentEquals
import kotlin.test.assertEquals
import kotlin.test.assertFailsWith
import kotlin.test.assertFalse
import kotlin.test.assertTrue
import kotlinx.serialization.SerialName
import kotlinx.serialization.Serializable
import kotlinx.serialization.json.Json

class ImagesTest {
    @Serializable
    class Case(
        val file: String,
        val size: Int,
        @SerialName("pan_and_scan") val panAndScan: Boolean,
        val count: Int,
        val pixels: String,
        val decoded: String? = null,
        val width: Int = 0,
        val height: Int = 0,
    )

    @Serializable
    class Refused(val file: String, val said: String)

    @Serializable
    class Boxes(val width: Int, val height: Int, val boxes: List<List<Int>>)

    private val folder = VectorFiles.folder("images")
    private val nothing = ImageDecoder { error("decoded") }

    private inline fun <reified T> read(name: String): T = Json.decodeFromString(File(folder, name).readText())

    private fun decoderOf(case: Case): ImageDecoder {
        val decoded = case.decoded ?: return ImageIoDecoder
        val numbers = ByteBuffer.wrap(File(folder, decoded).readBytes()).asIntBuffer()
        return ImageDecoder { Raster(case.width, case.height, IntArray(numbers.limit()) { numbers[it] }) }
    }

    private fun refusal(bytes: ByteArray, decoder: ImageDecoder = nothing): String {
        val message = assertFailsWith<BadInput> { Images.prepare(bytes, decoder, 56, false) }.message!!
        assertFalse('\n' in message)
        assertTrue(message.startsWith("the picture"), message)
        return message
    }

    @Test
    fun pixelsAreThoseOfPython() {
        val cases = read<List<Case>>("cases.json")
        val wrong = cases.filterNot { case ->
            val bytes = File(folder, case.file).readBytes()
            val pixels = Images.prepare(bytes, decoderOf(case), case.size, case.panAndScan).pixels
            val expected = File(folder, case.pixels).readBytes()
            assertEquals(case.count, pixels.size, case.file)
            pixels.flatMap { it.rgb.asIterable() }.toByteArray().contentEquals(expected)
        }
        assertEquals(emptyList(), wrong.map { it.file })
        assertTrue(cases.size >= 300 && cases.sumOf { it.count } > cases.size)
        println("images: ${cases.sumOf { it.count }} squares of ${cases.size} pictures equal Python's")
    }

    @Test
    fun boxesAreThoseOfPython() {
        for (case in read<List<Boxes>>("boxes.json")) {
            val boxes = PanAndScan.boxes(case.width, case.height).map { listOf(it.left, it.top, it.right, it.bottom) }
            assertEquals(case.boxes, boxes, "${case.width} × ${case.height}")
        }
    }

    @Test
    fun whatPythonRefusesIsRefused() {
        for (case in read<List<Refused>>("refused.json")) {
            val message = refusal(File(folder, case.file).readBytes(), ImageIoDecoder)
            for (same in listOf("over the limit of", "a side over", "not an image in")) {
                val cut = "0." in case.file || "no-" in case.file // Pillow calls some of these no image, we damaged
                if (!cut) assertEquals(same in case.said, same in message, "${case.file}: $message")
            }
        }
    }

    @Test
    fun aLargePictureIsRefusedFromItsHeader() {
        val said = refusal(File(folder, "not-megapixels").readBytes())
        assertEquals("the picture has 20000 × 15000 pixels, over the limit of 67108864; make it smaller", said)
        val long = "the picture has 65536 × 1 pixels, a side over 65535; cut it"
        assertEquals(long, refusal(File(folder, "not-long").readBytes()))
    }

    @Test
    fun moreBytesThanAnyPictureHasAreRefused() {
        val said = "the picture has 536870913 bytes, over the limit of 536870912; make it smaller"
        assertEquals(said, refusal(ByteArray(Images.MAX_BYTES + 1)))
    }

    @Test
    fun aFrameLargerThanTheHeaderSaysIsRefused() {
        val gif = "GIF89a".toByteArray() + byteArrayOf(1, 0, 1, 0)
        assertTrue("a side over" in refusal(gif) { Raster(70_000, 1, IntArray(70_000)) })
        val png = File(folder, read<List<Case>>("cases.json").first { it.file.endsWith("png") }.file).readBytes()
        assertTrue("its header says" in refusal(png) { Raster(31, 17, IntArray(31 * 17)) })
    }

    @Test
    fun tooLittleMemoryIsSaid() {
        val png = File(folder, "not-no-data").readBytes()
        val error = assertFailsWith<DoesNotFit> {
            Images.prepare(png, { throw OutOfMemoryError() }, 56, false)
        }
        assertTrue("64 × 64 pixels" in error.message!!)
    }

    @Test
    fun damagedHeadersAreReadOrRefused() {
        val random = Random(5)
        val files = read<List<Case>>("cases.json").map { File(folder, it.file) }.filter { it.length() < 20_000 }
        var refused = 0
        repeat(20_000) {
            val bytes = files.random(random).readBytes().let { it.copyOf(random.nextInt(it.size + 1)) }
            repeat(if (bytes.isEmpty()) 0 else random.nextInt(4)) {
                bytes[random.nextInt(minOf(bytes.size, 200))] = random.nextInt().toByte()
            }
            try {
                Images.prepare(bytes, { throw IllegalStateException("two\nlines") }, 56, false)
            } catch (error: BadInput) {
                assertFalse('\n' in error.message!!)
                refused++
            }
        }
        assertEquals(20_000, refused)
    }

    @Test
    fun theRasterIsNotChanged() {
        val raster = Raster(2, 1, intArrayOf(0x40_10_20_30, 0))
        Images.prepare(raster, 4, false)
        assertContentEquals(intArrayOf(0x40_10_20_30, 0), raster.argb)
    }

    @Test
    fun twelveMegapixelsTakeLessThanASecond() {
        val random = Random(1)
        val raster = Raster(4000, 3000, IntArray(12_000_000) { random.nextInt() })
        val clock = ManagementFactory.getThreadMXBean()
        val seconds = List(4) {
            val start = clock.currentThreadCpuTime // not the time of other builds beside this one
            Images.prepare(raster, 896, false)
            (clock.currentThreadCpuTime - start) / 1e9
        }
        println("images: 12 megapixels to 896 × 896: ${seconds.joinToString { "%.2f s".format(it) }}")
        assertTrue(seconds.min() < 1.0, "$seconds")
    }
}
