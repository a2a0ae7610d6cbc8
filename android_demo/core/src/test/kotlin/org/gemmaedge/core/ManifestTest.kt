package org.gemmaedge.core

import kotlinx.serialization.json.Json
import kotlin.test.Test
import kotlin.test.assertEquals

class ManifestTest {
    @Test
    fun readsSampling() {
        val sampling = Json.decodeFromString<Sampling>("""{"temperature": 1.0, "top_k": 64, "top_p": 0.95}""")
        assertEquals(Sampling(1.0, 64, 0.95), sampling)
    }
}
