package org.gemmaedge.core

/** A growing list of numbers without boxes. */
internal class Ids(private var values: IntArray = IntArray(16)) {
    var size = 0
        private set

    operator fun get(index: Int): Int = values[index]

    operator fun plusAssign(value: Int) {
        reserve(1)
        values[size++] = value
    }

    operator fun plusAssign(more: IntArray) {
        reserve(more.size)
        more.copyInto(values, size)
        size += more.size
    }

    /** Keeps the first [count] numbers. */
    fun cut(count: Int) {
        size = count
    }

    fun toIntArray(): IntArray = values.copyOf(size)

    private fun reserve(count: Int) {
        if (size + count > values.size) values = values.copyOf(maxOf(2 * values.size, size + count))
    }
}
