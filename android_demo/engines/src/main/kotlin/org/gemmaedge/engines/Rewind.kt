package org.gemmaedge.engines

import org.gemmaedge.core.CacheLayout
import org.gemmaedge.core.LayerCache

/**
 * Do the caches that hold the positions before [from] also serve a sequence that goes on at [to]?
 *
 * Then the next call at [to] gives the logits that it would give had nothing after [to] ever been fed. [window] is the
 * model's sliding window: the query at a position sees that position and the window − 1 before it.
 *
 * A full-attention layer has a slot for each position of the context, and a call reads only those before its own end.
 * What a sliding-window layer must still hold depends on [CacheLayout.style]:
 *
 * * "ring": position x is in slot x mod slots until x + slots is written. The query at [to] sees back to
 *   to − window + 1, so that position plus slots must not have been written yet. The mask derives each slot's position
 *   from the call's own end; a slot that still holds a later position counts as one whole ring earlier, which is before
 *   every window under the same condition.
 * * "compacting": the rows in use are the positions from a base on, and a call derives the base from its position alone.
 *   So the base must be the same at both positions. It moves when the rows are full: slots − window + 1 at once.
 *
 * A sequence that begins anew, at 0, reads nothing that was there.
 */
internal fun CacheLayout.canRewind(from: Int, to: Int, window: Int): Boolean =
    to in 0..from && (to == 0 || layers.all { it.kind != SLIDING || holds(it, from, to, window) })

private fun CacheLayout.holds(layer: LayerCache, from: Int, to: Int, window: Int): Boolean = when (style) {
    "ring" -> maxOf(0, to - window + 1) + layer.slots >= from
    "compacting" -> base(layer.slots, from, window) == base(layer.slots, to, window)
    else -> false
}

/** The position in the first row of a compacting cache of [slots] rows once [end] positions are fed. */
private fun base(slots: Int, end: Int, window: Int): Int {
    // A window longer than the context is cut to it: then nothing is ever dropped.
    val dropped = slots - minOf(window, slots) + 1
    val excess = maxOf(0, end - slots)
    return (excess + dropped - 1) / dropped * dropped
}

private const val SLIDING = "sliding_attention"
