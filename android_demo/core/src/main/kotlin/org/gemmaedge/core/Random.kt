package org.gemmaedge.core

/** The numbers that NumPy's `default_rng(seed)` draws: SeedSequence and PCG64. */
internal class Random(seed: Long) {
    // The state and increment of PCG64 have 128 bits each.
    private var stateHigh = 0L
    private var stateLow = 0L
    private val incrementHigh: Long
    private val incrementLow: Long
    private var half: Int? = null // the unused upper half of the last 64 bits

    init {
        val words = seedSequence(seed)
        fun long(index: Int) = (words[2 * index].toLong() and MASK) or (words[2 * index + 1].toLong() shl 32)
        incrementHigh = (long(2) shl 1) or (long(3) ushr 63)
        incrementLow = (long(3) shl 1) or 1
        step()
        add(long(0), long(1))
        step()
    }

    /** A number from 0 until 1, of 53 random bits. */
    fun double(): Double = (next() ushr 11) * TO_UNIT

    /** [count] numbers from 0 until [bound], as `integers(bound, size=count)` gives them (Lemire's method). */
    fun integers(bound: Int, count: Int): IntArray = IntArray(count) {
        val range = bound.toLong()
        var product = (int().toLong() and MASK) * range
        if (product and MASK < range) {
            val least = ((1L shl 32) - range) % range
            while (product and MASK < least) product = (int().toLong() and MASK) * range
        }
        (product ushr 32).toInt()
    }

    private fun int(): Int {
        half?.let {
            half = null
            return it
        }
        val both = next()
        half = (both ushr 32).toInt()
        return both.toInt()
    }

    private fun next(): Long {
        step()
        return (stateHigh xor stateLow).rotateRight((stateHigh ushr 58).toInt())
    }

    private fun step() {
        val high = unsignedHigh(stateLow, FACTOR_LOW) + stateHigh * FACTOR_LOW + stateLow * FACTOR_HIGH
        stateLow *= FACTOR_LOW
        stateHigh = high
        add(incrementHigh, incrementLow)
    }

    private fun add(high: Long, low: Long) {
        stateLow += low
        stateHigh += high + if (stateLow.toULong() < low.toULong()) 1 else 0
    }

    private companion object {
        const val MASK = 0xFFFFFFFFL
        const val TO_UNIT = 1.0 / (1L shl 53)
        const val FACTOR_HIGH = 2549297995355413924L
        const val FACTOR_LOW = 4865540595714422341L

        /** The upper 64 bits of the product of two unsigned numbers. */
        fun unsignedHigh(a: Long, b: Long): Long {
            val low = (a and MASK) * (b and MASK)
            val middle = (a ushr 32) * (b and MASK) + (low ushr 32)
            val other = (a and MASK) * (b ushr 32) + (middle and MASK)
            return (a ushr 32) * (b ushr 32) + (middle ushr 32) + (other ushr 32)
        }

        /** `SeedSequence(seed).generate_state(8)`: O'Neill's seed_seq with a pool of four words. */
        fun seedSequence(seed: Long): IntArray {
            val entropy = intArrayOf(seed.toInt(), (seed ushr 32).toInt(), 0, 0)
            var constant = 0x43b0d7e5
            fun hash(word: Int): Int {
                val mixed = word xor constant
                constant *= 0x931e8875.toInt()
                return (mixed * constant).let { it xor (it ushr 16) }
            }
            fun mix(a: Int, b: Int): Int = (a * 0xca01f9dd.toInt() - b * 0x4973f715).let { it xor (it ushr 16) }
            val pool = IntArray(4) { hash(entropy[it]) }
            for (source in 0..3) for (target in 0..3) {
                if (source != target) pool[target] = mix(pool[target], hash(pool[source]))
            }
            constant = 0x8b51f9dd.toInt()
            return IntArray(8) { index ->
                val mixed = pool[index % 4] xor constant
                constant *= 0x58f38ded
                (mixed * constant).let { it xor (it ushr 16) }
            }
        }
    }
}
