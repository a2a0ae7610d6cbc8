package org.gemmaedge.app.screens

import androidx.compose.foundation.layout.Arrangement
import androidx.compose.foundation.layout.Column
import androidx.compose.foundation.layout.Row
import androidx.compose.foundation.layout.fillMaxSize
import androidx.compose.foundation.layout.fillMaxWidth
import androidx.compose.foundation.layout.padding
import androidx.compose.foundation.layout.size
import androidx.compose.material3.Card
import androidx.compose.material3.CardDefaults
import androidx.compose.material3.Icon
import androidx.compose.material3.IconButton
import androidx.compose.material3.LinearProgressIndicator
import androidx.compose.material3.MaterialTheme
import androidx.compose.material3.Text
import androidx.compose.material3.TextButton
import androidx.compose.runtime.Composable
import androidx.compose.ui.Alignment
import androidx.compose.ui.Modifier
import androidx.compose.ui.graphics.vector.ImageVector
import androidx.compose.ui.semantics.LiveRegionMode
import androidx.compose.ui.semantics.contentDescription
import androidx.compose.ui.semantics.liveRegion
import androidx.compose.ui.semantics.semantics
import androidx.compose.ui.text.style.TextAlign
import androidx.compose.ui.unit.dp

/** A button of 48 dp with an icon, which a screen reader calls [name]. */
@Composable
fun Tool(icon: ImageVector, name: String, enabled: Boolean = true, onClick: () -> Unit) =
    IconButton(onClick, enabled = enabled, modifier = Modifier.size(48.dp)) { Icon(icon, contentDescription = name) }

/** A sentence about the last action. Screen readers say it when it appears. */
@Composable
fun Message(text: String, isError: Boolean, onDismiss: (() -> Unit)?) {
    val colors = MaterialTheme.colorScheme
    Card(
        Modifier.fillMaxWidth().semantics { liveRegion = LiveRegionMode.Polite },
        colors = CardDefaults.cardColors(
            containerColor = if (isError) colors.errorContainer else colors.secondaryContainer,
            contentColor = if (isError) colors.onErrorContainer else colors.onSecondaryContainer,
        ),
    ) {
        val end = if (onDismiss == null) 16.dp else 0.dp
        Row(Modifier.padding(start = 16.dp, end = end), verticalAlignment = Alignment.CenterVertically) {
            Text(text, Modifier.weight(1f).padding(vertical = 12.dp), style = MaterialTheme.typography.bodyMedium)
            if (onDismiss != null) Tool(Icons.Close, "Dismiss", onClick = onDismiss)
        }
    }
}

/** What is being done, how far it is, and a way to stop it. */
@Composable
fun Progress(words: String, share: Float?, onStop: (() -> Unit)?) = Column(Modifier.fillMaxWidth()) {
    Row(verticalAlignment = Alignment.CenterVertically) {
        Text(words, Modifier.weight(1f).padding(vertical = 12.dp), style = MaterialTheme.typography.bodyMedium)
        if (onStop != null) TextButton(onStop) { Text("Stop") }
    }
    val bar = Modifier.fillMaxWidth().semantics { contentDescription = words }
    if (share == null) LinearProgressIndicator(bar) else LinearProgressIndicator({ share.coerceIn(0f, 1f) }, bar)
}

/** What a screen says while it has nothing to show. */
@Composable
fun Nothing(title: String, text: String, modifier: Modifier = Modifier) = Column(
    modifier.fillMaxSize().padding(32.dp),
    verticalArrangement = Arrangement.spacedBy(8.dp, Alignment.CenterVertically),
    horizontalAlignment = Alignment.CenterHorizontally,
) {
    Text(title, style = MaterialTheme.typography.titleMedium, textAlign = TextAlign.Center)
    Text(
        text,
        style = MaterialTheme.typography.bodyMedium,
        color = MaterialTheme.colorScheme.onSurfaceVariant,
        textAlign = TextAlign.Center,
    )
}
