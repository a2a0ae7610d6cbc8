package org.gemmaedge.app.model

import org.gemmaedge.core.Artifact

/**
 * A runtime in this app: the name of its [library] in a bundle's manifest, and its [version]. If it [refusesNewer], it
 * reads no file that a newer runtime wrote.
 */
class Runtime(val title: String, val library: String, val version: String, val refusesNewer: Boolean)

/** The runtimes by format ("onnx", "pte"). */
class Runtimes(private val byFormat: Map<String, Runtime>) {
    /** Why this app cannot run an artifact of [format], in one sentence; null when it may. */
    fun problem(format: String, artifact: Artifact): String? {
        val runtime = byFormat[format] ?: return "this app has no runtime for .$format files; use .onnx or .pte"
        val written = artifact.versions[runtime.library] ?: return null
        if (!runtime.refusesNewer || !isNewer(written, runtime.version)) return null
        return "the .$format is for ${runtime.title} $written, and this app has ${runtime.version}; update the app, or " +
            "export with ${runtime.title} ${runtime.version}"
    }

    companion object {
        // Those of gradle/libs.versions.toml.
        const val ONNXRUNTIME = "1.30.0"
        const val EXECUTORCH = "1.5.1"

        /** What this app ships. ONNX Runtime itself refuses a file that is too new for it, and says why. */
        val SHIPPED = Runtimes(
            mapOf(
                "onnx" to Runtime("ONNX Runtime", "onnxruntime", ONNXRUNTIME, refusesNewer = false),
                "pte" to Runtime("ExecuTorch", "executorch", EXECUTORCH, refusesNewer = true),
            ),
        )

        /** By major and minor number: patches of a runtime read one another's files. */
        private fun isNewer(one: String, other: String): Boolean {
            val (first, second) = Pair(numbers(one), numbers(other))
            return compareValuesBy(first, second, { it[0] }, { it[1] }) > 0
        }

        private fun numbers(version: String): List<Int> =
            (version.split('.').map { part -> part.takeWhile(Char::isDigit).toIntOrNull() ?: 0 } + listOf(0, 0)).take(2)
    }
}
