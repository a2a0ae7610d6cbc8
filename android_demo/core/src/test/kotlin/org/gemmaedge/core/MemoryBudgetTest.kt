package org.gemmaedge.core

import kotlin.test.Test
import kotlin.test.assertEquals
import kotlin.test.assertFalse
import kotlin.test.assertTrue

class MemoryBudgetTest {
    private fun artifact(peak: Long): Artifact =
        Artifact("m", listOf("m"), CacheLayout("ring", 1, 1, listOf()), listOf(), listOf(), mapOf(), 1, peak)

    @Test
    fun whatFitsIsSaidWithBothFigures() {
        val fit = MemoryBudget.fit(artifact(1_500_000_000), 3_000_000_000, 500_000_000)
        assertTrue(fit.fits)
        assertEquals(listOf(1_500_000_000, 2_500_000_000), listOf(fit.needed, fit.available))
        assertEquals("It fits: the model needs 1.50 GB of memory, and this phone has 2.50 GB to spare.", fit.sentence)
    }

    @Test
    fun whatDoesNotFitIsSaidWithARemedy() {
        val fit = MemoryBudget.fit(artifact(1_500_000_001), 2_000_000_000, 500_000_000)
        assertFalse(fit.fits)
        assertEquals(
            "It does not fit: the model needs 1.50 GB of memory, and this phone has 1.50 GB to spare; close other " +
                "apps, or export with a smaller context or fewer bits.",
            fit.sentence,
        )
    }

    @Test
    fun belowTheThresholdThereIsNothingToSpare() {
        val fit = MemoryBudget.fit(artifact(3_000_000), 400_000_000, 500_000_000)
        assertEquals(0, fit.available)
        assertTrue("needs 3.0 MB" in fit.sentence && "has 0.0 MB" in fit.sentence)
    }
}
