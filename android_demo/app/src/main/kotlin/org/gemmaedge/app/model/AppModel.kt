package org.gemmaedge.app.model

import java.io.File
import kotlinx.coroutines.CoroutineScope
import org.gemmaedge.core.EngineFactory

/** All that the app does, without Android: one model in memory, and what the four screens show. */
class AppModel(platform: Platform, factory: EngineFactory, scope: CoroutineScope) {
    val host = EngineHost(platform, factory, LoadMarker(File(platform.root, "loading")), scope)
    val models = ModelsModel(platform, host, scope)
    val chat = ChatModel(platform, host, scope)
    val selfCheck = SelfCheckModel(host)
    val benchmark = BenchmarkModel(platform, host, factory)

    /** The system wants memory back, or puts the app to sleep. What was said is saved already. */
    fun onLowMemory() {
        host.unload("The model was let go to free the phone's memory; tap Load to go on.")
    }
}
