package org.gemmaedge.core

import java.io.File

/** What `android_demo/ci/vectors.py` wrote for the tests that compare with Python. */
internal object VectorFiles {
    fun folder(name: String): File {
        val root = System.getProperty("vectors")
        val folder = File(root ?: "no folder given", name)
        check(folder.isDirectory) {
            "$folder: no such folder; from the repository's root run python android_demo/ci/vectors.py, " +
                "then the tests with -Dvectors=<root>/android_demo/ci/target/vectors"
        }
        return folder
    }
}
