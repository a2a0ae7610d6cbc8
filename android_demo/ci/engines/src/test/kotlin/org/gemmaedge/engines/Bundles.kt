package org.gemmaedge.engines

import java.io.File
import org.gemmaedge.core.Bundle

/** The demo bundles that check.sh exports, and the formats that this machine can run. */
internal object Bundles {
    val formats: List<String> = System.getProperty("formats").orEmpty().split(",").filter { it.isNotEmpty() }

    fun read(name: String): Bundle {
        val folder = File(System.getProperty("bundles") ?: "no folder given", name)
        check(formats.isNotEmpty() && folder.isDirectory) {
            "$folder: no such bundle, or no format to run; run android_demo/ci/check.sh, which makes bundles and says " +
                "what this machine can run"
        }
        return Bundle.read(folder)
    }
}
